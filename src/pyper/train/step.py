"""One optimizer step."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyper.data import Batch
from pyper.errors import DataError, NonFiniteError, OutOfMemoryError
from pyper.nn import Transformer
from pyper.routing import LayerStatistics, sum_statistics
from pyper.train.loss import LossFunction
from pyper.train.optimizer import ExpertOptimizer


@dataclass(frozen=True)
class StepResult:
    """What one step measured."""

    loss: float
    """Nats per token (per unit of weight), before the update."""
    gradient_norm: float
    """Before clipping."""
    routing: tuple[LayerStatistics, ...] = ()
    """Of each sparse layer, over the whole batch; on the device."""


StepFunction = Callable[[Sequence[Batch], float], StepResult]
"""Learns from micro-batches, at this share of the peak rates."""

NewStep = Callable[[Transformer, ExpertOptimizer, LossFunction], StepFunction]


@dataclass(frozen=True)
class Measured:
    """What the gradients were made from, still on the device."""

    sums: Tensor
    """(3,) float32: summed loss, summed weight, norm of the mean gradient."""
    routing: tuple[LayerStatistics, ...]


def train_step(
    model: Transformer,
    micro_batches: Sequence[Batch],
    optimizer: ExpertOptimizer,
    rate_factor: float,
    loss_fn: LossFunction,
) -> StepResult:
    """Accumulate gradients over `micro_batches`, check them, update the weights.

    The result does not depend on how the batch was cut: sums of losses are divided by the sum of
    weights at the end. Raises NonFiniteError before anything was updated, DataError when all
    weights are zero.
    """
    measured = compute_gradients(model, micro_batches, optimizer, loss_fn)
    result = checked(measured, optimizer)
    optimizer.set_rates(rate_factor)
    update(model, optimizer)
    return result


def compute_gradients(
    model: Transformer,
    micro_batches: Sequence[Batch],
    optimizer: ExpertOptimizer,
    loss_fn: LossFunction,
) -> Measured:
    """Clipped gradients of the mean loss. Never waits for the device."""
    # 1. gradients of the summed loss
    total = torch.zeros((), device=model.device)
    weight = torch.zeros((), device=model.device)
    routed = []
    for batch in micro_batches:
        loss = loss_fn(model, batch.to(model.device))
        loss.objective().backward()
        optimizer.collect_gradients()
        total += loss.total.detach()
        weight += loss.weight
        routed.append([r.statistics for r in loss.routed])

    # 2. the mean: one number of tokens for the whole batch
    norm = optimizer.clip_gradients(scale=1.0 / weight)
    statistics = tuple(sum_statistics(list(layer)) for layer in zip(*routed, strict=True))
    return Measured(torch.stack((total, weight, norm.float())), statistics)


def checked(measured: Measured, optimizer: ExpertOptimizer) -> StepResult:
    """The step's numbers; raises, with gradients dropped, where they may not be learned from.

    NonFiniteError for a loss or gradient that is not finite, DataError for weights of zero.
    """
    sums = measured.sums.tolist()  # the one wait for the device in a step
    return judged(sums, measured.routing, optimizer)


def judged(
    sums: Sequence[float], routing: tuple[LayerStatistics, ...], optimizer: ExpertOptimizer
) -> StepResult:
    """`checked`, of sums (3,) that are on the host already."""
    total, weight, norm = sums
    if weight == 0:
        optimizer.clear_gradients()
        raise DataError(
            "the weights of a whole batch are zero: there is nothing to learn from",
            hint="check what `batch_transform` or `loss_fn` does with such a batch",
        )
    loss = total / weight
    if not math.isfinite(loss) or not math.isfinite(norm):
        optimizer.clear_gradients()
        raise NonFiniteError(
            f"the loss is {loss:g} and the gradient norm {norm:g}",
            hint="lower `train.learning_rate` or lengthen `train.warmup_steps`, in a new folder "
            "(`--set run.folder=runs/NAME`)",
        )
    return StepResult(loss, norm, routing)


def update(model: Transformer, optimizer: ExpertOptimizer) -> None:
    """Move the weights by their gradients, and routing thresholds by what they observed."""
    optimizer.update_weights()
    model.end_step()


def explain_out_of_memory(
    error: BaseException, name: str, micro_batch_size: int
) -> OutOfMemoryError | None:
    """The PyperError for a device that is full; None for any other error."""
    is_full = isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
    if not is_full:
        return None
    hint = f"try `--set train.micro_batch_size={max(1, micro_batch_size // 2)}` (same results)"
    if micro_batch_size == 1:
        hint = "lower `data.seq_len` or the size of the model"
    first_line = str(error).splitlines()[0]
    return OutOfMemoryError(
        f"{name}: out of memory at {micro_batch_size} sequences per pass: {first_line}", hint=hint
    )
