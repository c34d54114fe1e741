"""AdamW in one pass: each weight, gradient and moment is read once and written once.

Weights are float32, or bf16 with the low 16 bits of a float32 beside them, or bf16 rounded at
random (see `rounding`); moments are float32 or 8 bits (see `state_8bit`). Gradients are scaled and
clipped on the way, by a factor that is still on the device. All tensors of one kind go in one
launch; nothing waits for the device, and a recorded graph stays valid. A step changes memory that
it knows by address, so it is no operator that a compiler could trace.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from pyper.kernels import launch
from pyper.kernels.multi_tensor import TableCache, as_aligned, triton_type
from pyper.kernels.rounding import (
    more_bits,
    random_bits,
    random_key,
    store_masters,
    to_masters,
)
from pyper.kernels.state_8bit import BLOCK, Moment

if launch.HAS_TRITON:
    from pyper.kernels.adamw_kernel import _adamw

# Blocks of 256 numbers of a program, and its warps: half as many where codes take most of the time.
_ROWS, _WARPS, _WARPS_OF_CODES = 8, 8, 4
# Weights that the twin has as float32 at one time.
_AT_ONCE = 2**27


@dataclass(frozen=True)
class AdamWTensors:
    """One weight and what AdamW keeps for it, all contiguous."""

    weight: Tensor
    """float32 or bf16, any shape."""
    low: Tensor | None
    """int16: the rest of a float32; a bf16 weight without it is rounded at random."""
    mean: Moment
    square: Moment
    weight_decay: float
    number: int
    """Its place in `steps`, and part of the key of its random bits."""


@dataclass(frozen=True)
class AdamWSettings:
    """What all tensors have in common."""

    beta1: float
    beta2: float
    eps: float
    random_seed: int = 0
    """Of rounding at random."""


def adamw_step(
    tensors: Sequence[AdamWTensors],
    grads: Sequence[Tensor],
    steps: Tensor,
    lr: Tensor | float,
    factor: Tensor,
    settings: AdamWSettings,
    tables: TableCache,
) -> None:
    """One step of AdamW (arXiv:1711.05101) with gradients grads · factor, all in place.

    grads: bf16 or float32, in the shapes of the weights; used up. steps: (n,) float32, updates made
    so far by `number`; counted up here. lr, factor: float32 without dimensions, on the device (lr
    may be a number where no kernel runs).
    """
    if not tensors or not launch.runs_triton(tensors[0].weight):
        adamw_step_torch(tensors, grads, steps, lr, factor, settings, tables)
        return
    counts = steps.unbind()
    torch._foreach_add_([counts[t.number] for t in tensors], 1)
    updates = steps.double()
    betas = (settings.beta1, settings.beta2)
    corrections = [(1 - torch.pow(beta, updates)).float() for beta in betas]
    kinds: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, (t, grad) in enumerate(zip(tensors, grads, strict=True)):
        kinds[t.weight.dtype, t.low is None, t.mean.values.dtype, grad.dtype].append(i)
    for members in kinds.values():
        chosen = [tensors[i] for i in members], [as_aligned(grads[i]) for i in members]
        _launch(*chosen, steps, corrections, lr, factor, settings, tables)


def adamw_step_torch(
    tensors: Sequence[AdamWTensors],
    grads: Sequence[Tensor],
    steps: Tensor,
    lr: Tensor | float,
    factor: Tensor,
    settings: AdamWSettings,
    tables: TableCache,
) -> None:
    """The twin of `adamw_step`, in plain torch: its own fused AdamW where moments are float32."""
    counts = steps.unbind()
    groups: dict[tuple[float, int], list[int]] = defaultdict(list)
    seen = 0
    for i, t in enumerate(tensors):
        groups[t.weight_decay, seen // _AT_ONCE].append(i)
        seen += t.weight.numel()
    for (weight_decay, _), members in groups.items():
        chosen = [tensors[i] for i in members]
        masters = to_masters([t.weight for t in chosen], [t.low for t in chosen])
        given = [grads[i].to(m.dtype).contiguous() for i, m in zip(members, masters, strict=True)]
        torch._foreach_mul_(given, factor)
        means, squares = [t.mean.read() for t in chosen], [t.square.read() for t in chosen]
        adamw(
            masters,
            given,
            means,
            squares,
            [],
            [counts[t.number] for t in chosen],
            fused=True,
            amsgrad=False,
            beta1=settings.beta1,
            beta2=settings.beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=settings.eps,
            maximize=False,
        )
        _store(chosen, masters, means, squares, counts, settings.random_seed)


def _store(
    tensors: list[AdamWTensors],
    masters: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    counts: Sequence[Tensor],
    seed: int,
) -> None:
    """Put back what was not updated in place."""

    def random(i: int) -> Tensor:
        t = tensors[i]
        return random_bits(t.weight, random_key(seed, t.number, counts[t.number]))

    for i, t in enumerate(tensors):
        if t.mean.largest is not None:
            bits = random(i)
            t.mean.write(means[i], bits)
            t.square.write(squares[i], bits >> 16)
    weights, lows = [t.weight for t in tensors], [t.low for t in tensors]
    store_masters(masters, weights, lows, lambda i: more_bits(random(i)))


def _launch(
    tensors: list[AdamWTensors],
    grads: list[Tensor],
    steps: Tensor,
    corrections: list[Tensor],
    lr: Tensor | float,
    factor: Tensor,
    settings: AdamWSettings,
    tables: TableCache,
) -> None:
    """One kind: equal types of weights, moments and gradients."""
    first = tensors[0]
    key = (tuple(t.number for t in tensors), grads[0].dtype)
    table = tables.get(key, _columns(tensors), _ROWS * BLOCK)
    numbers = table.constant([t.number for t in tensors], torch.int32)
    decays = table.constant([t.weight_decay for t in tensors], torch.float32)
    given = table.changing(grads)
    for pieces, masked in table.launches():
        _adamw[(len(pieces),)](
            *(table.addresses, given, table.sizes, pieces, numbers, decays, len(tensors)),
            *(steps, *corrections, lr, factor),
            *(1 - settings.beta1, 1 - settings.beta2, settings.eps, settings.random_seed),
            WEIGHT=triton_type(first.weight.dtype),
            GRAD=triton_type(grads[0].dtype),
            SPLIT=first.low is not None,
            STOCHASTIC=first.low is None and first.weight.dtype == torch.bfloat16,
            SMALL=first.mean.largest is not None,
            MASKED=masked,
            ALIGNED=table.aligned,
            ROWS=_ROWS,
            num_warps=_WARPS if first.mean.largest is None else _WARPS_OF_CODES,
        )


def _columns(tensors: list[AdamWTensors]) -> list[list[Tensor]]:
    """What the kernel expects in each row of its table of addresses."""
    nowhere = tensors[0].weight.new_empty(0)
    parts = [
        (t.weight, t.low, t.mean.values, t.square.values, t.mean.largest, t.square.largest)
        for t in tensors
    ]
    return [[nowhere if x is None else x for x in column] for column in zip(*parts, strict=True)]
