"""The kernel of `thin_linear` for several rows: weights stream through shared memory."""

import triton
import triton.language as tl

from pyper.kernels.activation import _value_and_slope
from pyper.kernels.overlap import ask_ahead, wait_for_others


@triton.jit
def _widened(w, x):
    if w.dtype == tl.int8:
        w = w.to(tl.float32)  # every integer of eight bits is exact in bf16
    return w.to(x.dtype)


@triton.jit
def _scaled(sums, n, scale_ptr, bias_ptr, N_ROWS, HAS_SCALE, HAS_BIAS):
    """Scale and bias of output rows n; sums (BLOCK_N, BLOCK_B)."""
    if HAS_SCALE:
        sums *= tl.load(scale_ptr + n, mask=n < N_ROWS, other=0.0).to(tl.float32)[:, None]
    if HAS_BIAS:
        sums += tl.load(bias_ptr + n, mask=n < N_ROWS, other=0.0).to(tl.float32)[:, None]
    return sums


@triton.jit
def _finish(
    sums,
    values,
    n,
    b,
    added,
    outputs,
    B,
    N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NEXT: tl.constexpr,
):
    """What follows the sums (BLOCK_N, BLOCK_B), and the stores."""
    scale_ptr, bias_ptr, residual_ptr = added
    out_ptr, next_gain_ptr, next_ptr, next_squares_ptr = outputs
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    N_ROWS: tl.constexpr = 2 * N if GATED else N
    sums = _scaled(sums, n, scale_ptr, bias_ptr, N_ROWS, HAS_SCALE, HAS_BIAS)
    if ACTIVATION != "":
        sums, _ = _value_and_slope(sums, ACTIVATION)
    if GATED:
        sums *= _scaled(values, N + n, scale_ptr, bias_ptr, N_ROWS, HAS_SCALE, HAS_BIAS)
    at = b.to(tl.int64)[None, :] * N + n[:, None]
    there = (n < N)[:, None] & (b < B)[None, :]
    if HAS_RESIDUAL:
        # As two operations would: the product is rounded before it is added.
        sums = sums.to(out_ptr.dtype.element_ty).to(tl.float32)
        sums += tl.load(residual_ptr + at, mask=there, other=0.0).to(tl.float32)
    out = sums.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, out, mask=there)
    if HAS_NEXT:
        wide = tl.where(there, out.to(tl.float32), 0.0)
        gain = tl.load(next_gain_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(next_ptr + at, wide * gain[:, None], mask=there)
        squares = tl.sum(wide * wide, axis=0)
        tl.store(next_squares_ptr + tl.program_id(0) * B + b, squares, mask=b < B)


@triton.jit
def _joined(part_ptr, at, N_SPLITS: tl.constexpr, size: tl.constexpr):
    """The sum of all parts, in their order."""
    # Others may have written them: not from a cache of this processor.
    total = tl.load(part_ptr + at, cache_modifier=".cg")
    for part in tl.static_range(1, N_SPLITS):
        total += tl.load(part_ptr + part * size + at, cache_modifier=".cg")
    return total


@triton.jit(do_not_specialize=["B"])
def thin_linear_block(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    gain_ptr,
    squares_ptr,
    residual_ptr,
    out_ptr,
    next_gain_ptr,
    next_ptr,
    next_squares_ptr,
    part_ptr,
    tickets_ptr,
    B,
    eps,
    N: tl.constexpr,
    D: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_NORM: tl.constexpr,
    N_SQUARES: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NEXT: tl.constexpr,
    N_SPLITS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LINES: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    """A block of outputs from a part of the inputs; program (block, part).

    HAS_NORM: x is to be normalised; N_SQUARES > 0: its gain is in it, and so many parts of the sum
    of its squares are known.
    """
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    PER_SPLIT: tl.constexpr = (D + N_SPLITS * BLOCK_D - 1) // (N_SPLITS * BLOCK_D) * BLOCK_D
    EVEN: tl.constexpr = PER_SPLIT * N_SPLITS == D
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.arange(0, BLOCK_B)
    first = tl.program_id(1) * PER_SPLIT
    # What lies beyond the matrix or the rows is read again, not masked, and never stored.
    weight_rows = weight_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * D + first
    x_rows = x_ptr + tl.minimum(b, B - 1)[None, :] * D + first
    sums = tl.zeros((BLOCK_N, BLOCK_B), dtype=tl.float32)
    values = tl.zeros((BLOCK_N, BLOCK_B), dtype=tl.float32)
    squares = tl.zeros((BLOCK_B,), dtype=tl.float32)
    if OVERLAP:
        IN_LINE: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth
        ask_ahead(weight_rows + tl.arange(0, LINES)[None, :] * IN_LINE)
    wait_for_others(OVERLAP)
    if N_SQUARES > 0:  # asked for here, used behind the loop
        SQUARES: tl.constexpr = triton.next_power_of_2(N_SQUARES)
        part = tl.arange(0, SQUARES)
        known = (part < N_SQUARES)[:, None] & (b < B)[None, :]
        of_parts = tl.load(squares_ptr + part[:, None] * B + b[None, :], mask=known, other=0.0)
    for start in range(0, PER_SPLIT, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        if EVEN:
            x = tl.load(x_rows + d[:, None])
            w = tl.load(weight_rows + d[None, :])
        else:
            inside = first + d < D
            x = tl.load(x_rows + d[:, None], mask=inside[:, None], other=0.0)
            w = tl.load(weight_rows + d[None, :], mask=inside[None, :], other=0.0)
        if HAS_NORM and N_SQUARES == 0:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, axis=0)
            gain = tl.load(gain_ptr + first + d, mask=first + d < D, other=0.0).to(tl.float32)
            x = (wide * gain[:, None]).to(x_ptr.dtype.element_ty)
        sums = tl.dot(_widened(w, x), x, sums)
        if GATED:
            if EVEN:
                w = tl.load(weight_rows + N * D + d[None, :])
            else:
                w = tl.load(
                    weight_rows + N * D + d[None, :], mask=(first + d < D)[None, :], other=0.0
                )
            values = tl.dot(_widened(w, x), x, values)
    if HAS_NORM:
        if N_SQUARES > 0:
            squares = tl.sum(of_parts, axis=0)
        scale = tl.rsqrt(squares / D + eps)[None, :]
        sums *= scale
        values *= scale
    added = (scale_ptr, bias_ptr, residual_ptr)
    outputs = (out_ptr, next_gain_ptr, next_ptr, next_squares_ptr)
    if N_SPLITS == 1:
        _finish(
            *(sums, values, n, b, added, outputs, B, N, ACTIVATION, HAS_SCALE, HAS_BIAS),
            *(HAS_RESIDUAL, HAS_NEXT),
        )
    else:
        # Parts lie as whole blocks, gates before values: (parts, 1 or 2, blocks, BLOCK_N, BLOCK_B).
        block: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N * BLOCK_N * BLOCK_B
        size: tl.constexpr = 2 * block if GATED else block
        at = n[:, None] * BLOCK_B + b[None, :]
        own = part_ptr + tl.program_id(1) * size
        tl.store(own + at, sums)
        if GATED:
            tl.store(own + block + at, values)
        tl.debug_barrier()  # all threads have stored their part of the part
        ticket = tickets_ptr + tl.program_id(0)
        if tl.atomic_add(ticket, 1, sem="acq_rel") == N_SPLITS - 1:
            tl.debug_barrier()
            sums = _joined(part_ptr, at, N_SPLITS, size)
            if GATED:
                values = _joined(part_ptr + block, at, N_SPLITS, size)
            _finish(
                *(sums, values, n, b, added, outputs, B, N, ACTIVATION, HAS_SCALE, HAS_BIAS),
                *(HAS_RESIDUAL, HAS_NEXT),
            )
            tl.store(ticket, 0)
