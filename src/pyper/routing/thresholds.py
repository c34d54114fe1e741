"""Causal expert choice: a token goes to every expert whose score exceeds that expert's threshold.

The threshold is a moving average of the k-th score that expert choice accepted in training. It is
a constant of the model, so a token's experts depend on that token's state alone: causal, and the
same in any batch (arXiv:2603.11535).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ThresholdAverage:
    """A bias-corrected moving average of each expert's k-th score."""

    total: Tensor
    """(E,) float32: Σ (1 − β) βⁱ q, not yet corrected."""
    updates: Tensor
    """() int64, optimizer steps that went into it."""

    def value(self, decay: float) -> Tensor:
        """(E,): total / (1 − β^updates); −∞ (every token passes) before the first update."""
        # 1 − β^u written so that it keeps its digits: at β = 0.9999 and u = 1 the difference would
        # put a threshold 1e-4 too high, above a gate that is saturated at 1
        log_decay = math.log(decay) if decay > 0 else -math.inf
        weight = -torch.expm1(self.updates.to(self.total.dtype) * log_decay)
        return torch.where(self.updates > 0, self.total / weight, -torch.inf)

    def updated(self, kth_score: Tensor, decay: float) -> "ThresholdAverage":
        """With one optimizer step's mean k-th score (E,) in it."""
        return ThresholdAverage(
            decay * self.total + (1 - decay) * kth_score.detach().to(self.total), self.updates + 1
        )


def above_threshold(scores: Tensor, threshold: Tensor, padding: Tensor | None = None) -> Tensor:
    """(N, E) bool: scores (N, E) above threshold (E,); never True where padding (N,) is."""
    chosen = scores > threshold
    return chosen if padding is None else chosen & ~padding[:, None]
