"""Muon's passes over memory, before and after its matrix products; see `adamw` for the formats."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyper.kernels import launch
from pyper.kernels.multi_tensor import TableCache, TensorTable, as_aligned, triton_type
from pyper.kernels.rounding import (
    random_bits,
    random_key,
    store_masters,
    to_masters,
)
from pyper.kernels.state_8bit import BLOCK, Moment

if launch.HAS_TRITON:
    import triton
    import triton.language as tl

    from pyper.kernels.multi_tensor import pointer, read, write
    from pyper.kernels.rounding import as_bf16, bits_at, high_half, join_halves, key_of, low_half
    from pyper.kernels.state_8bit import decode_signed, encode_signed

# Blocks of 256 numbers and warps of a program: 8 numbers for each thread.
_ROWS, _WARPS = 8, 8


def nesterov(
    moments: Sequence[Moment],
    grads: Sequence[Tensor],
    numbers: Sequence[int],
    step: Tensor,
    factor: Tensor,
    momentum: float,
    dtype: torch.dtype,
    random_seed: int,
    tables: TableCache,
) -> list[Tensor]:
    """Nesterov's directions, in `dtype`; moments are changed in place, grads are used up.

    g = grad · factor; moment ← lerp(g, moment, momentum); direction = lerp(g, moment, momentum).
    numbers (of the tensors), step (without dimensions) and random_seed are the key of the random
    bits that round moments of 8 bits.
    """
    if not launch.runs_triton(grads[0]):
        return nesterov_torch(
            moments, grads, numbers, step, factor, momentum, dtype, random_seed, tables
        )
    first, nowhere = moments[0], step.new_empty(0)
    grads = [as_aligned(g) for g in grads]
    columns = [
        [m.values for m in moments],
        [m.largest if m.largest is not None else nowhere for m in moments],
    ]
    table = tables.get(("nesterov", *numbers), columns, _ROWS * BLOCK)
    directions = [torch.empty_like(g, dtype=dtype) for g in grads]
    given, out = table.changing(grads), table.changing(directions, row=1)
    keys = table.constant(numbers, torch.int32)
    for pieces, masked in table.launches():
        _nesterov[(len(pieces),)](
            *(table.addresses, given, out, table.sizes, pieces, keys, len(grads)),
            *(step, factor, momentum, 1 - momentum, random_seed),
            GRAD=triton_type(grads[0].dtype),
            OUT=triton_type(dtype),
            SMALL=first.largest is not None,
            MASKED=masked,
            ALIGNED=table.aligned,
            ROWS=_ROWS,
            num_warps=_WARPS,
        )
    return directions


def nesterov_torch(
    moments: Sequence[Moment],
    grads: Sequence[Tensor],
    numbers: Sequence[int],
    step: Tensor,
    factor: Tensor,
    momentum: float,
    dtype: torch.dtype,
    random_seed: int,
    tables: TableCache,
) -> list[Tensor]:
    """The twin of `nesterov`, in plain torch."""
    means = [m.read() for m in moments]
    scaled = [g.to(m.dtype) for g, m in zip(grads, means, strict=True)]
    torch._foreach_mul_(scaled, factor)
    torch._foreach_lerp_(means, scaled, 1 - momentum)
    directions = torch._foreach_lerp(scaled, means, momentum)
    for moment, mean, number in zip(moments, means, numbers, strict=True):
        if moment.largest is not None:
            moment.write(mean, random_bits(mean, random_key(random_seed, number, step)))
    return [d.to(dtype) for d in directions]


def add_updates(
    weights: Sequence[Tensor],
    lows: Sequence[Tensor | None],
    updates: Sequence[Tensor],
    numbers: Sequence[int],
    step: Tensor,
    lr: Tensor | float,
    weight_decay: float,
    scale: float,
    random_seed: int,
    tables: TableCache,
) -> None:
    """weight ← weight · (1 − lr · weight_decay) + lr · scale · update, in place.

    weights of one type: float32, or bf16 with the low bits of a float32 (int16) or rounded at
    random. updates: bf16 or float32, of one type. All contiguous.
    """
    if not launch.runs_triton(weights[0]):
        add_updates_torch(
            *(weights, lows, updates, numbers, step, lr, weight_decay, scale, random_seed), tables
        )
        return
    updates, nowhere = [as_aligned(u) for u in updates], step.new_empty(0)
    columns = [weights, [low if low is not None else nowhere for low in lows]]
    table = tables.get(("add", *numbers), columns, _ROWS * BLOCK)
    _launch_add(
        table,
        *(weights[0].dtype, lows[0] is not None, updates, numbers, step),
        *(lr, weight_decay, scale, random_seed),
    )


def _launch_add(
    table: TensorTable,
    dtype: torch.dtype,
    split: bool,
    updates: Sequence[Tensor],
    numbers: Sequence[int],
    step: Tensor,
    lr: Tensor | float,
    weight_decay: float,
    scale: float,
    random_seed: int,
) -> None:
    given, keys = table.changing(updates), table.constant(numbers, torch.int32)
    for pieces, masked in table.launches():
        _add_updates[(len(pieces),)](
            *(table.addresses, given, table.sizes, pieces, keys, len(updates)),
            *(step, lr, weight_decay, scale, random_seed),
            WEIGHT=triton_type(dtype),
            UPDATE=triton_type(updates[0].dtype),
            SPLIT=split,
            STOCHASTIC=not split and dtype == torch.bfloat16,
            MASKED=masked,
            ALIGNED=table.aligned,
            ROWS=_ROWS,
            num_warps=_WARPS,
        )


def add_updates_torch(
    weights: Sequence[Tensor],
    lows: Sequence[Tensor | None],
    updates: Sequence[Tensor],
    numbers: Sequence[int],
    step: Tensor,
    lr: Tensor | float,
    weight_decay: float,
    scale: float,
    random_seed: int,
    tables: TableCache,
) -> None:
    """The twin of `add_updates`, in plain torch."""
    masters = to_masters(weights, lows)
    torch._foreach_mul_(masters, 1 - lr * weight_decay)
    wide_updates = [u.to(m.dtype) for u, m in zip(updates, masters, strict=True)]
    torch._foreach_add_(masters, torch._foreach_mul(wide_updates, lr * scale))
    store_masters(
        masters,
        weights,
        lows,
        lambda i: random_bits(weights[i], random_key(random_seed, numbers[i], step)),
    )


if launch.HAS_TRITON:

    @triton.jit(do_not_specialize=["seed"])  # a seed of 1 would be no number but a constant
    def _nesterov(
        addresses,
        grads,
        directions,
        sizes,
        pieces,
        numbers,
        n_tensors,
        step_ptr,
        factor_ptr,
        momentum,
        rest,
        seed,
        GRAD: tl.constexpr,
        OUT: tl.constexpr,
        SMALL: tl.constexpr,
        MASKED: tl.constexpr,
        ALIGNED: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        t = tl.load(pieces + 2 * tl.program_id(0))
        row = tl.load(pieces + 2 * tl.program_id(0) + 1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        at = row[:, None] * 256 + tl.arange(0, 256)[None, :]
        inside = at < tl.load(sizes + t)
        has_row = row * 256 < tl.load(sizes + t)
        top_ptr = pointer(addresses + n_tensors + t, tl.float32, ALIGNED) + row
        grad = read(pointer(grads + t, GRAD, ALIGNED) + at, inside, MASKED).to(tl.float32)
        grad *= tl.load(factor_ptr)
        if SMALL:
            mean_ptr = pointer(addresses + t, tl.int8, ALIGNED) + at
            top = read(top_ptr, has_row, MASKED)
            mean = decode_signed(read(mean_ptr, inside, MASKED), top)
        else:
            mean_ptr = pointer(addresses + t, tl.float32, ALIGNED) + at
            mean = read(mean_ptr, inside, MASKED)
        mean += (grad - mean) * rest
        direction = grad + (mean - grad) * momentum
        write(pointer(directions + t, OUT, ALIGNED) + at, direction.to(OUT), inside, MASKED)
        if SMALL:
            number = tl.load(numbers + t)
            key = key_of(seed, number, tl.load(step_ptr).to(tl.int32))
            code, top = encode_signed(mean, bits_at(at, key))
            write(mean_ptr, code, inside, MASKED)
            write(top_ptr, top, has_row, MASKED)
        else:
            write(mean_ptr, mean, inside, MASKED)

    @triton.jit(do_not_specialize=["seed"])  # a seed of 1 would be no number but a constant
    def _add_updates(
        addresses,
        updates,
        sizes,
        pieces,
        numbers,
        n_tensors,
        step_ptr,
        lr_ptr,
        weight_decay,
        scale,
        seed,
        WEIGHT: tl.constexpr,
        UPDATE: tl.constexpr,
        SPLIT: tl.constexpr,
        STOCHASTIC: tl.constexpr,
        MASKED: tl.constexpr,
        ALIGNED: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        t = tl.load(pieces + 2 * tl.program_id(0))
        row = tl.load(pieces + 2 * tl.program_id(0) + 1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        at = row[:, None] * 256 + tl.arange(0, 256)[None, :]
        inside = at < tl.load(sizes + t)
        weight_ptr = pointer(addresses + t, WEIGHT, ALIGNED) + at
        low_ptr = pointer(addresses + n_tensors + t, tl.int16, ALIGNED) + at
        update = read(pointer(updates + t, UPDATE, ALIGNED) + at, inside, MASKED).to(tl.float32)
        lr = tl.load(lr_ptr)
        weight = read(weight_ptr, inside, MASKED)
        if SPLIT:
            weight = join_halves(weight, read(low_ptr, inside, MASKED))
        weight = weight.to(tl.float32) * (1.0 - lr * weight_decay) + lr * scale * update
        if SPLIT:
            high = high_half(weight, 0x8000)
            write(low_ptr, low_half(weight, high), inside, MASKED)
            write(weight_ptr, as_bf16(high), inside, MASKED)
        elif STOCHASTIC:
            number = tl.load(numbers + t)
            key = key_of(seed, number, tl.load(step_ptr).to(tl.int32))
            carry = (bits_at(at, key) & 0xFFFF).to(tl.int32)
            write(weight_ptr, as_bf16(high_half(weight, carry)), inside, MASKED)
        else:
            write(weight_ptr, weight, inside, MASKED)
