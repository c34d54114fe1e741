"""Tensors in 8-bit floats as products on tensor cores take them: contraction contiguous, one scale.

A tensor is a factor of two products, once along its rows and once along its columns: one pass reads
it and writes both. Scales are powers of two, from the largest value or a bound of it; another pass,
which only reads, finds that (deterministic: no atomics).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pyper.kernels import launch
from pyper.kernels.launch import block_of, wide

if launch.HAS_TRITON:
    import triton
    import triton.language as tl

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# A largest value below it is taken for it: scales stay within float32.
_SMALLEST = 2.0**-100
# Sums of squares below it may have lost parts of themselves.
_LEAST_SQUARES = 1e-30
# So many partial results, whatever the GPU; rows of tiles that a program reads at a time.
_PARTS, _TILE = 512, 8192
_PAIRS, _BLOCK_D = 64, 128


class Factor(NamedTuple):
    """x ≈ rows · scale, in both layouts."""

    rows: Tensor
    """(N, D)"""
    columns: Tensor
    """(D, N), contiguous: the transposed."""
    scale: Tensor
    """(), float32"""


def to_fp8(x: Tensor, dtype: torch.dtype, bound: Tensor | None = None) -> Factor:
    """x (N, D), N even, in 8 bits; `bound` (): at least its largest value, sought without it.

    A not-a-number or infinity in x makes the scale not a number, so that it is not hidden.
    """
    inverse, scale = scales(largest_of(x) if bound is None else bound, dtype)
    rows, columns = (cast_both if _by_kernel(x) else cast_both_torch)(x, inverse, dtype)
    return Factor(rows, columns, scale)


def largest_of(x: Tensor) -> Tensor:
    """max |x|, (), float32, of (N, D); not a number where one of them is none."""
    if not _by_kernel(x):
        return x.detach().abs().amax().float()
    return measure(x, False)[0].amax()


def largest_and_norm_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """max |x| as above, and the largest norm of a row, or a bound of it where squares overflow."""
    if _by_kernel(x):
        largest, squares = (parts.amax() for parts in measure(x, True))
    else:
        largest, squares = measure_torch(x)
    norm = squares.sqrt().masked_fill(squares <= _LEAST_SQUARES, torch.inf)
    return largest, torch.minimum(norm, largest * x.shape[1] ** 0.5)


def scales(largest: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(1 / scale, scale), () float32: the power of two that makes best use of the range.

    Powers of two lose no bits.
    """
    ratio = torch.finfo(dtype).max / largest.clamp(min=_SMALLEST)
    exponent = torch.log2(ratio).floor()
    # Filled, not chosen: a number of Python's for `where` would be copied to the GPU first.
    scale = torch.exp2(-exponent).masked_fill(~largest.isfinite(), torch.nan)
    return torch.exp2(exponent), scale


def _by_kernel(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and launch.runs_triton(x)


def measure_torch(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest |x| and the largest sum of squares of a row, (), in plain torch."""
    largest = x.detach().abs().amax().float()
    return largest, x.detach().float().square().sum(dim=1).amax()


def cast_both_torch(x: Tensor, inverse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The twin of `cast_both`, in plain torch."""
    rows = (x.to(wide(x.dtype)) * inverse).to(dtype)
    return rows, rows.t().contiguous()


@torch.library.custom_op("pyper::fp8_measure", mutates_args=())
def measure(x: Tensor, norms: bool) -> tuple[Tensor, Tensor]:
    """Parts (P,) float32, whose maxima are those of |x| and of rows' squares (empty if not asked).

    x (N, D) bf16.
    """
    x = x.contiguous()
    largest, squares = _parts_of(x, norms)
    block = block_of(x.shape[1], 2048)
    rows = max(1, _TILE // block)
    _measure[(len(largest),)](
        *(x, largest, squares, len(x), x.shape[1], len(largest)),
        NORMS=norms,
        ROWS=rows,
        BLOCK_D=block,
        num_warps=8,
    )
    return largest, squares


@measure.register_fake
def _(x: Tensor, norms: bool) -> tuple[Tensor, Tensor]:
    return _parts_of(x, norms)


def _parts_of(x: Tensor, norms: bool) -> tuple[Tensor, Tensor]:
    rows = max(1, _TILE // block_of(x.shape[1], 2048))
    n_parts = min(_PARTS, -(-len(x) // rows))
    largest = x.new_empty(n_parts, dtype=torch.float32)
    return largest, x.new_empty(n_parts if norms else 0, dtype=torch.float32)


@torch.library.custom_op("pyper::fp8_cast_both", mutates_args=())
def cast_both(x: Tensor, inverse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x · inverse in 8 bits, (N, D), and transposed, (D, N); x bf16, N even."""
    x = x.contiguous()
    pairs, D = len(x) // 2, x.shape[1]
    rows, columns = _both_of(x, dtype)
    _cast_both[(triton.cdiv(pairs, _PAIRS) * triton.cdiv(D, _BLOCK_D),)](
        *(x, inverse, rows, columns.view(torch.int16), pairs, D),
        PAIRS=_PAIRS,
        BLOCK_D=_BLOCK_D,
        num_warps=8,
    )
    return rows, columns


@cast_both.register_fake
def _(x: Tensor, inverse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _both_of(x, dtype)


def _both_of(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    N, D = x.shape
    return x.new_empty(N, D, dtype=dtype), x.new_empty(D, N, dtype=dtype)


if launch.HAS_TRITON:

    @triton.jit
    def _side_by_side(even, odd, NARROW: tl.constexpr):
        """Numbers of two rows as pairs of bytes of type NARROW: one conversion makes a pair.

        Not from bytes that were converted apart: ptxas (12.8, 12.9) then loses some, and takes what
        lies on a register that nobody wrote.
        """
        both = tl.join(even, odd).to(NARROW).to(tl.uint8, bitcast=True)
        first, second = tl.split(both)
        return first.to(tl.int16) | (second.to(tl.int16) << 8)

    @triton.jit
    def _measure(
        x_ptr,
        largest_ptr,
        squares_ptr,
        N,
        D,
        P,
        NORMS: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        part = tl.program_id(0)
        d = tl.arange(0, BLOCK_D)
        # As integers, absolute values stand in order, and what is no number above all that are.
        largest = tl.zeros((ROWS, BLOCK_D), dtype=tl.int32)
        most = tl.zeros((ROWS,), dtype=tl.float32)
        for block in range(part * ROWS, N, P * ROWS):
            # From the end: it was written last, and the cast after this starts at the other one;
            # either way some of it is still in the cache.
            n = N - 1 - block - tl.arange(0, ROWS)
            squares = tl.zeros((ROWS,), dtype=tl.float32)
            for start in range(0, D, BLOCK_D):
                at = n.to(tl.int64)[:, None] * D + (start + d)[None, :]
                inside = (n >= 0)[:, None] & (start + d < D)[None, :]
                x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
                bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
                largest = tl.maximum(largest, bits)
                if NORMS:
                    squares += tl.sum(x * x, axis=1)
            most = tl.maximum(most, squares)
        found = tl.max(tl.max(largest, axis=1), axis=0)
        tl.store(largest_ptr + part, found.to(tl.float32, bitcast=True))
        if NORMS:
            tl.store(squares_ptr + part, tl.max(most, axis=0))

    @triton.jit
    def _cast_rows(x_ptr, rows_ptr, at, inside, inverse):
        """Stores narrow rows; and gives them before they were narrowed."""
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * inverse
        tl.store(rows_ptr + at, x.to(rows_ptr.dtype.element_ty), mask=inside)
        return x

    @triton.jit
    def _cast_both(
        x_ptr,
        inverse_ptr,
        rows_ptr,
        columns_ptr,
        P,
        D,
        PAIRS: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        across = tl.cdiv(D, BLOCK_D)
        pair = tl.program_id(0) // across * PAIRS + tl.arange(0, PAIRS)
        d = tl.program_id(0) % across * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = (pair < P)[:, None] & (d < D)[None, :]
        at = (2 * pair).to(tl.int64)[:, None] * D + d[None, :]
        inverse = tl.load(inverse_ptr)
        even = _cast_rows(x_ptr, rows_ptr, at, inside, inverse)
        odd = _cast_rows(x_ptr, rows_ptr, at + D, inside, inverse)
        # Of two rows, neighbours in a column: 16 bits are transposed in one instruction, 8 are not.
        both = _side_by_side(even, odd, rows_ptr.dtype.element_ty)
        inside = (d < D)[:, None] & (pair < P)[None, :]
        at = d.to(tl.int64)[:, None] * P + pair[None, :]
        tl.store(columns_ptr + at, tl.trans(both), mask=inside)
