"""What a step learns from."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Sequences to learn from.

    Attributes:
        tokens: int64 (B, T).
        targets: int64 (B, T), the token after each.
        weights: float32 (B, T) of the losses, or None for all equal.
    """

    tokens: Tensor
    targets: Tensor
    weights: Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on `device`; from pinned memory without waiting for the copy."""
        weights = None if self.weights is None else self.weights.to(device, non_blocking=True)
        return Batch(
            self.tokens.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            weights,
        )

    def pin_memory(self) -> "Batch":
        """A copy in pinned memory."""
        weights = None if self.weights is None else self.weights.pin_memory()
        return Batch(self.tokens.pin_memory(), self.targets.pin_memory(), weights)

    def split(self, micro_batch_size: int) -> "list[Batch]":
        """Batches of at most `micro_batch_size` sequences, in order; the last may be smaller."""
        return [
            Batch(
                self.tokens[i : i + micro_batch_size],
                self.targets[i : i + micro_batch_size],
                None if self.weights is None else self.weights[i : i + micro_batch_size],
            )
            for i in range(0, len(self.tokens), micro_batch_size)
        ]
