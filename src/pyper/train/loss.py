"""Losses, in float32 and causal."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pyper.data import Batch
from pyper.kernels import linear_cross_entropy
from pyper.nn import Routed, Transformer


@dataclass(frozen=True)
class LossSum:
    """A sum of losses and the weight it is divided by: sums add up over micro-batches."""

    total: Tensor
    """Scalar, nats."""
    weight: Tensor
    """Scalar, usually the number of tokens."""
    routed: tuple[Routed, ...] = ()
    """What the sparse layers said, with their balancing losses per token."""

    def objective(self) -> Tensor:
        """What is differentiated: the total, and balancing losses for as much weight."""
        auxiliary = [r.auxiliary for r in self.routed if r.auxiliary is not None]
        if not auxiliary:
            return self.total
        return self.total + torch.stack(auxiliary).sum() * self.weight


LossFunction = Callable[[Transformer, Batch], LossSum]
"""What a batch costs. The loop divides the sum of `total` by the sum of `weight`."""

BatchTransform = Callable[[Batch], Batch]
"""Changes a batch before the model sees it: masks, noise, other targets."""


def next_token_loss(model: Transformer, batch: Batch) -> LossSum:
    """Cross-entropy of the next token, in nats, weighted by `batch.weights` where given."""
    reading = model.read(batch.tokens)
    return loss_of_states(model, reading.states.flatten(0, 1), batch, reading.routed)


def loss_of_states(
    model: Transformer, states: Tensor, batch: Batch, routed: tuple[Routed, ...] = ()
) -> LossSum:
    """`next_token_loss` where the final states (B·T, D) are there already."""
    weights = None if batch.weights is None else batch.weights.flatten().float()
    total = linear_cross_entropy(states, model.head.weight, batch.targets.flatten(), weights)
    weight = torch.full_like(total, batch.targets.numel()) if weights is None else weights.sum()
    return LossSum(total, weight, routed)


def token_loss(logits: Tensor, batch: Batch) -> LossSum:
    """Sum of cross-entropies of logits (B, T, V) against the batch's targets."""
    flat = logits.flatten(0, 1).float()
    if batch.weights is None:
        total = F.cross_entropy(flat, batch.targets.flatten(), reduction="sum")
        return LossSum(total, torch.full_like(total, batch.targets.numel()))
    losses = F.cross_entropy(flat, batch.targets.flatten(), reduction="none")
    weights = batch.weights.flatten().float()
    return LossSum((losses * weights).sum(), weights.sum())
