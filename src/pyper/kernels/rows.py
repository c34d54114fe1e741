"""Rows to the experts and back: gather (N, D) → (E, C, D), and combine (E, C, D) → (N, D).

Each is the other's gradient. Combining reads through the inverse index (`Choice.slots`), token by
token and expert after expert: no atomics, one order of additions, every output written once.
"""

from typing import Any

import torch
from torch import Tensor

from pyper.kernels import launch
from pyper.kernels.launch import block_of, wide

if launch.HAS_TRITON:
    import triton
    import triton.language as tl


def gather_rows(x: Tensor, token_index: Tensor, slots: Tensor) -> Tensor:
    """x[token_index], (E, C, D), of x (N, D); token_index (E, C), slots (N, E) its inverse."""
    if not launch.runs_triton(x):
        return gather_rows_torch(x, token_index, slots)
    out: Tensor = _GatherRows.apply(x, token_index, slots)
    return out


def gather_rows_torch(x: Tensor, token_index: Tensor, slots: Tensor) -> Tensor:
    """The twin of `gather_rows`, in plain torch."""
    return x[token_index]


def combine_rows(
    rows: Tensor,
    token_index: Tensor,
    slots: Tensor,
    gates: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """out_n = residual_n + Σ_e gates_ne · rows[e, slots_ne] over the experts that took token n.

    rows (E, C, D), token_index (E, C), slots (N, E); gates (N, E) float32, 1 without; residual
    (N, D), 0 without. Returns (N, D) in the type of rows; sums are in float32.
    """
    if not launch.runs_triton(rows):
        return combine_rows_torch(rows, token_index, slots, gates, residual)
    out: Tensor = _CombineRows.apply(rows, token_index, slots, gates, residual)
    return out


def combine_rows_torch(
    rows: Tensor,
    token_index: Tensor,
    slots: Tensor,
    gates: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The twin of `combine_rows`, in plain torch."""
    dtype = wide(rows.dtype)
    start = rows.new_zeros(len(slots), rows.shape[-1]) if residual is None else residual
    parts = rows.to(dtype)
    if gates is not None:
        parts = parts * gates.T.gather(1, token_index).unsqueeze(-1)
    total = start.to(dtype).index_add(0, token_index.flatten(), parts.flatten(0, 1))
    return total.to(rows.dtype)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token_index: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots.contiguous())
        return take_rows(x.contiguous(), token_index)

    @staticmethod
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        return sum_rows(drows.contiguous(), slots), None, None


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        token_index: Tensor,
        slots: Tensor,
        gates: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        rows, token_index, slots = rows.contiguous(), token_index.contiguous(), slots.contiguous()
        gates = None if gates is None else gates.contiguous()
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.save_for_backward(token_index, gates, None if gates is None else rows)
        return sum_rows(rows, slots, gates, None if residual is None else residual.contiguous())

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        token_index, gates, rows = ctx.saved_tensors
        dout = dout.contiguous()
        dresidual = None if ctx.residual_dtype is None else dout.to(ctx.residual_dtype)
        if gates is None:
            return take_rows(dout, token_index), None, None, None, dresidual
        drows, dgates = combine_gradients(dout, rows, gates, token_index)
        return drows, None, None, dgates, dresidual


@torch.library.custom_op("pyper::take_rows", mutates_args=())
def take_rows(x: Tensor, token_index: Tensor) -> Tensor:
    """x[token_index] of contiguous x (N, D) and token_index (E, C); no gradient."""
    (E, C), D = token_index.shape, x.shape[1]
    out = x.new_empty(E, C, D)
    cols = block_of(D, 2048)
    rows = max(1, 4096 // cols)
    grid = (triton.cdiv(E * C, rows), triton.cdiv(D, cols))
    index = token_index.contiguous()
    _take_rows[grid](x, index, out, E * C, D=D, BLOCK_R=rows, BLOCK_D=cols, num_warps=4)
    return out


@take_rows.register_fake
def _(x: Tensor, token_index: Tensor) -> Tensor:
    return x.new_empty(*token_index.shape, x.shape[1])


@torch.library.custom_op("pyper::sum_rows", mutates_args=())
def sum_rows(
    rows: Tensor,
    slots: Tensor,
    gates: Tensor | None = None,
    residual: Tensor | None = None,
    coefficients: Tensor | None = None,
    vectors: Tensor | None = None,
) -> Tensor:
    """`combine_rows` without gradient, plus coefficients (N, E) · vectors (E, D) where given.

    That product is the router's share in the gradient of its input: adding it here saves writing
    and reading an (N, D) on the way. All tensors contiguous; coefficients float32, vectors in the
    type of rows (loads of one width need no exchange between threads).
    """
    (E, C, D), N = rows.shape, len(slots)
    out = rows.new_empty(N, D)
    product = coefficients is not None
    cols = block_of(D, 2048)
    block_n = max(2 if product else 1, 2048 // cols)
    _sum_rows[(triton.cdiv(N, block_n), triton.cdiv(D, cols))](
        *(rows, slots, gates, residual, coefficients, vectors, out, N, C),
        D=D,
        E=E,
        HAS_GATES=gates is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_PRODUCT=product,
        BLOCK_N=block_n,
        BLOCK_D=cols,
        num_warps=8 if product else 4,
    )
    return out


@sum_rows.register_fake
def _(
    rows: Tensor,
    slots: Tensor,
    gates: Tensor | None = None,
    residual: Tensor | None = None,
    coefficients: Tensor | None = None,
    vectors: Tensor | None = None,
) -> Tensor:
    return rows.new_empty(len(slots), rows.shape[-1])


@torch.library.custom_op("pyper::combine_gradients", mutates_args=())
def combine_gradients(
    dout: Tensor, rows: Tensor, gates: Tensor, token_index: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of rows (E, C, D) and gates (N, E) in `combine_rows`; all contiguous."""
    E, C, D = rows.shape
    drows, dgates = torch.empty_like(rows), torch.zeros_like(gates)
    cols = block_of(D, 4096)
    _combine_gradients[(E * C,)](
        *(dout, rows, gates, token_index, drows, dgates, C),
        D=D,
        E=E,
        BLOCK_D=cols,
        num_warps=max(1, min(8, cols // 512)),
    )
    return drows, dgates


@combine_gradients.register_fake
def _(dout: Tensor, rows: Tensor, gates: Tensor, token_index: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(gates)


if launch.HAS_TRITON:

    @triton.jit
    def _take_rows(
        x_ptr, index_ptr, out_ptr, R, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
    ):
        r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = (r < R)[:, None] & (d < D)[None, :]
        n = tl.load(index_ptr + r, mask=r < R, other=0)
        row = tl.load(x_ptr + n[:, None] * D + d[None, :], mask=inside)
        tl.store(out_ptr + r[:, None] * D + d[None, :], row, mask=inside)

    @triton.jit
    def _sum_rows(
        rows_ptr,
        slots_ptr,
        gates_ptr,
        residual_ptr,
        coefficients_ptr,
        vectors_ptr,
        out_ptr,
        N,
        C,
        D: tl.constexpr,
        E: tl.constexpr,
        HAS_GATES: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
        HAS_PRODUCT: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = (n < N)[:, None] & (d < D)[None, :]
        total = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
        if HAS_RESIDUAL:
            start = tl.load(residual_ptr + n[:, None] * D + d[None, :], mask=inside, other=0.0)
            total += start.to(tl.float32)
        for e in range(E):
            if HAS_PRODUCT:
                a = tl.load(coefficients_ptr + n * E + e, mask=n < N, other=0.0)
                b = tl.load(vectors_ptr + e * D + d, mask=d < D, other=0.0).to(tl.float32)
                total += a[:, None] * b[None, :]
            slot = tl.load(slots_ptr + n * E + e, mask=n < N, other=-1)
            # Most tokens are taken by few experts: what nobody here took is not looked at.
            if tl.max(slot, axis=0) >= 0:
                at = (slot.to(tl.int64) + e * C)[:, None] * D + d[None, :]
                taken = (slot >= 0)[:, None] & (d < D)[None, :]
                part = tl.load(rows_ptr + at, mask=taken, other=0.0).to(tl.float32)
                if HAS_GATES:
                    gate = tl.load(gates_ptr + n * E + e, mask=n < N, other=0.0)
                    part *= gate[:, None]
                total += part
        tl.store(out_ptr + n[:, None] * D + d[None, :], total, mask=inside)

    @triton.jit
    def _combine_gradients(
        dout_ptr,
        rows_ptr,
        gates_ptr,
        index_ptr,
        drows_ptr,
        dgates_ptr,
        C,
        D: tl.constexpr,
        E: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        r = tl.program_id(0).to(tl.int64)
        n = tl.load(index_ptr + r)
        at = n * E + r // C
        gate = tl.load(gates_ptr + at)
        dot = tl.zeros((BLOCK_D,), dtype=tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            dout = tl.load(dout_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
            row = tl.load(rows_ptr + r * D + d, mask=d < D, other=0.0).to(tl.float32)
            tl.store(drows_ptr + r * D + d, gate * dout, mask=d < D)
            dot += dout * row
        tl.store(dgates_ptr + at, tl.sum(dot, axis=0))
