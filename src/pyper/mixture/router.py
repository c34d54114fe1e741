"""Routers: who reads the prefix before one expert is chosen."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from pyper.nn import Transformer

# Pseudo-counts per entry, spread as the whole data are: rare tokens stay possible everywhere.
_SMOOTHING = 0.1


class PrefixRouter(Protocol):
    """Scores tokens for every expert."""

    def token_scores(self, tokens: Tensor) -> Tensor:
        """log p_e(x_{t+1}), (B, T, E) float32, of windows (B, T + 1)."""


class UnigramRouter:
    """Token frequencies of each expert's training text: scores p_e(x) without context."""

    def __init__(self, counts: Tensor) -> None:
        """counts: (E, V), how often each expert read each token in training."""
        self.counts = counts
        self.log_probs = smoothed_log_probs(counts.double()).float()

    def token_scores(self, tokens: Tensor) -> Tensor:
        """log p_e(x_{t+1}), (B, T, E), of windows (B, T + 1)."""
        table = self.log_probs.to(tokens.device)
        scores: Tensor = table.T[tokens[:, 1:]]
        return scores


def smoothed_log_probs(counts: Tensor) -> Tensor:
    """log frequencies (E, V) of counts (E, V), interpolated with those of all experts together."""
    vocab_size = counts.shape[-1]
    overall = counts.sum(dim=0) + 1.0
    prior = _SMOOTHING * vocab_size * overall / overall.sum()
    smoothed = counts + prior
    return (smoothed / smoothed.sum(dim=-1, keepdim=True)).log()


class LMRouter:
    """One tiny language model per expert (SMALLTALK, arXiv:2410.03529)."""

    def __init__(self, models: Sequence[Transformer]) -> None:
        self.models = list(models)

    @torch.no_grad()
    def token_scores(self, tokens: Tensor) -> Tensor:
        """log p_e(x_{t+1} | x_≤t), (B, T, E), of windows (B, T + 1)."""
        scores = [_log_probs_of_next(m, tokens.to(m.device)) for m in self.models]
        return torch.stack(scores, dim=-1).to(tokens.device)


def _log_probs_of_next(model: Transformer, tokens: Tensor) -> Tensor:
    log_probs: Tensor = model(tokens[:, :-1]).float().log_softmax(dim=-1)
    return log_probs.gather(-1, tokens[:, 1:, None]).squeeze(-1)
