"""Queries, keys and values in one product of 8-bit floats, turned where they lie.

The backward pass turns gradients back on their way into 8 bits: nobody writes them in 16.
"""

from typing import Any

import torch
from torch import Tensor

from pyper.kernels import launch
from pyper.kernels.fp8_cast import E4M3, E5M2, Factor, largest_of, scales, to_fp8
from pyper.kernels.fp8_products import fp8_linear, product
from pyper.kernels.launch import block_of
from pyper.kernels.rotary import turn_in_place, turned_torch

if launch.HAS_TRITON:
    import triton
    import triton.language as tl

    from pyper.kernels.fp8_cast import _side_by_side

# Pairs of tokens and heads that a program turns with the same angles.
_PAIRS, _HEADS = 32, 4


def fp8_rotated_heads(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`rotated_heads` with 8-bit factors (see `fp8_linear`), without bias; x (B, T, D)."""
    if not launch.runs_triton(x):
        return fp8_rotated_heads_torch(x, weight, cos, sin, n_heads, n_kv_heads)
    query, key, value = _RotatedHeads.apply(x, weight, cos, sin, n_heads, n_kv_heads)
    return query, key, value


def fp8_rotated_heads_torch(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The twin of `fp8_rotated_heads`, in plain torch but for casts and products."""
    heads = fp8_linear(x.flatten(0, 1), weight).view(*x.shape[:2], -1, cos.shape[-1])
    turned, value = heads.split((n_heads + n_kv_heads, n_kv_heads), dim=2)
    query, key = turned_torch(turned, cos, sin).split((n_heads, n_kv_heads), dim=2)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


class _RotatedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        n_heads: int,
        n_kv_heads: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        (B, T, D), K = x.shape, cos.shape[-1]
        cos, sin = cos.reshape(-1, K).float(), sin.reshape(-1, K).float()
        x8, w8 = to_fp8(x.reshape(-1, D), E4M3), to_fp8(weight, E4M3)
        factors = (x8.rows, w8.rows, x8.scale, w8.scale)
        turned = rotated_fp8_product(*factors, x.dtype, cos, sin, n_heads + n_kv_heads)
        ctx.save_for_backward(x8.columns, x8.scale, w8.columns, w8.scale, cos, sin)
        heads = turned.view(B, T, -1, K).transpose(1, 2)
        query, key, value = heads.split((n_heads, n_kv_heads, n_kv_heads), dim=1)
        return query, key, value

    @staticmethod
    def backward(
        ctx: Any, dquery: Tensor, dkey: Tensor, dvalue: Tensor
    ) -> tuple[Tensor | None, ...]:
        columns, scale, weight, w_scale, cos, sin = ctx.saved_tensors
        needed, dtype = ctx.needs_input_grad, dquery.dtype
        g = _gradient_to_fp8(dquery, dkey, dvalue, cos, sin)
        dx = product("input", g.rows, weight, g.scale, w_scale, dtype) if needed[0] else None
        dx = None if dx is None else dx.view(len(dquery), dquery.shape[2], -1)
        dweight = (
            product("weight", g.columns, columns, g.scale, scale, dtype) if needed[1] else None
        )
        return dx, dweight, None, None, None, None


def _gradient_to_fp8(
    dquery: Tensor, dkey: Tensor, dvalue: Tensor, cos: Tensor, sin: Tensor
) -> Factor:
    """The product's gradient (B·T, W) in e5m2. Turning adds at most a factor of √2 to numbers."""
    parts = (dquery, dkey, dvalue)
    largest = torch.stack([largest_of(_as_it_lies(part)) for part in parts]).amax()
    inverse, scale = scales(2**0.5 * largest, E5M2)
    rows, columns = turned_back_to_fp8(*parts, cos, sin, inverse)
    return Factor(rows, columns, scale)


def _as_it_lies(x: Tensor) -> Tensor:
    """x (B, H, T, K) in the order of its memory, so that nothing is copied; (·, K)."""
    strides = x.stride()
    order = sorted(range(4), key=lambda i: (-strides[i], i))
    return x.permute(order).reshape(-1, x.shape[-1])


@torch.library.custom_op("pyper::rotated_fp8_product", mutates_args=())
def rotated_fp8_product(
    rows: Tensor,
    weight: Tensor,
    scale: Tensor,
    w_scale: Tensor,
    dtype: torch.dtype,
    cos: Tensor,
    sin: Tensor,
    turned: int,
) -> Tensor:
    """`rotated_product` of factors in 8 bits, rows (N, D) and weight (W, D), with their scales."""
    heads = product("forward", rows, weight, scale, w_scale, dtype)
    turn_in_place(heads, cos, sin, turned)
    return heads


@rotated_fp8_product.register_fake
def _(
    rows: Tensor,
    weight: Tensor,
    scale: Tensor,
    w_scale: Tensor,
    dtype: torch.dtype,
    cos: Tensor,
    sin: Tensor,
    turned: int,
) -> Tensor:
    return rows.new_empty(len(rows), len(weight), dtype=dtype)


@torch.library.custom_op("pyper::turned_back_to_fp8", mutates_args=())
def turned_back_to_fp8(
    dquery: Tensor, dkey: Tensor, dvalue: Tensor, cos: Tensor, sin: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """`rotation_gradient` · inverse in e5m2, (B·T, W) and (W, B·T); B·T is even."""
    rows, columns = _gradient_of(dquery, dkey)
    (B, H, T, K), kv_heads = dquery.shape, dkey.shape[1]
    pairs = columns.view(torch.int16)
    for part, first in ((dquery, 0), (dkey, H), (dvalue, H + kv_heads)):
        given = part if part.stride(3) == 1 else part.contiguous()
        heads = given.shape[1]
        grid = (triton.cdiv(B * T // 2, _PAIRS), triton.cdiv(heads, _HEADS))
        _turn_back_to_fp8[grid](
            *(given, *given.stride()[:3], cos, sin, inverse, rows, pairs),
            *(B * T // 2, rows.shape[1], T, len(cos), first, heads),
            TURNS=first < H + kv_heads,
            HALF=K // 2,
            HEADS=_HEADS,
            PAIRS=_PAIRS,
            BLOCK_K=block_of(K // 2, K),
            num_warps=8,
        )
    return rows, columns


@turned_back_to_fp8.register_fake
def _(
    dquery: Tensor, dkey: Tensor, dvalue: Tensor, cos: Tensor, sin: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    return _gradient_of(dquery, dkey)


def _gradient_of(dquery: Tensor, dkey: Tensor) -> tuple[Tensor, Tensor]:
    B, H, T, K = dquery.shape
    width = (H + 2 * dkey.shape[1]) * K
    shapes = ((B * T, width), (width, B * T))
    rows, columns = (dquery.new_empty(shape, dtype=E5M2) for shape in shapes)
    return rows, columns


if launch.HAS_TRITON:

    @triton.jit
    def _turned_heads(from_ptr, to_ptr, inside, cos, sin, HALF: tl.constexpr):
        """Stores both halves of heads, turned back; and gives them before they were narrowed."""
        a = tl.load(from_ptr, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(from_ptr + HALF, mask=inside, other=0.0).to(tl.float32)
        left, right = a * cos + b * sin, b * cos - a * sin
        tl.store(to_ptr, left.to(to_ptr.dtype.element_ty), mask=inside)
        tl.store(to_ptr + HALF, right.to(to_ptr.dtype.element_ty), mask=inside)
        return left, right

    @triton.jit
    def _turn_back_to_fp8(
        from_ptr,
        stride_b,
        stride_h,
        stride_t,
        cos_ptr,
        sin_ptr,
        inverse_ptr,
        rows_ptr,
        columns_ptr,
        N_PAIRS,
        W,
        T,
        P,
        first,
        n_heads,
        TURNS: tl.constexpr,
        HALF: tl.constexpr,
        HEADS: tl.constexpr,
        PAIRS: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
        k = tl.arange(0, BLOCK_K)
        even, odd = 2 * pair, 2 * pair + 1
        inside = (pair < N_PAIRS)[:, None] & (k < HALF)[None, :]

        # 1. angles, with the scale in them: it is a power of two
        inverse = tl.load(inverse_ptr)
        even_cos = tl.full((PAIRS, BLOCK_K), 1.0, tl.float32) * inverse
        even_sin = tl.zeros((PAIRS, BLOCK_K), tl.float32)
        odd_cos, odd_sin = even_cos, even_sin
        if TURNS:
            at = (even % P * (2 * HALF) + HALF)[:, None] + k[None, :]
            even_cos = inverse * tl.load(cos_ptr + at, mask=inside, other=0.0)
            even_sin = inverse * tl.load(sin_ptr + at, mask=inside, other=0.0)
            at = (odd % P * (2 * HALF) + HALF)[:, None] + k[None, :]
            odd_cos = inverse * tl.load(cos_ptr + at, mask=inside, other=0.0)
            odd_sin = inverse * tl.load(sin_ptr + at, mask=inside, other=0.0)

        # 2. heads of two tokens each; bytes of two rows, neighbours in a column, go together
        even_at = (even // T).to(tl.int64) * stride_b + (even % T).to(tl.int64) * stride_t
        odd_at = (odd // T).to(tl.int64) * stride_b + (odd % T).to(tl.int64) * stride_t
        to = even.to(tl.int64)[:, None] * W + k[None, :]
        across = (pair < N_PAIRS)[None, :] & (k < HALF)[:, None]
        for i in range(HEADS):
            h = tl.program_id(1) * HEADS + i
            here = inside & (h < n_heads)
            head = from_ptr + tl.cast(h, tl.int64) * stride_h + k[None, :]
            rows = rows_ptr + to + (first + h) * (2 * HALF)
            left, right = _turned_heads(
                head + even_at[:, None], rows, here, even_cos, even_sin, HALF
            )
            odd_left, odd_right = _turned_heads(
                head + odd_at[:, None], rows + W, here, odd_cos, odd_sin, HALF
            )
            column = tl.cast((first + h) * (2 * HALF), tl.int64) + k
            down = columns_ptr + column[:, None] * N_PAIRS + pair[None, :]
            here = across & (h < n_heads)
            lefts = _side_by_side(left, odd_left, rows_ptr.dtype.element_ty)
            tl.store(down, tl.trans(lefts), mask=here)
            down += HALF * tl.cast(N_PAIRS, tl.int64)
            rights = _side_by_side(right, odd_right, rows_ptr.dtype.element_ty)
            tl.store(down, tl.trans(rights), mask=here)
