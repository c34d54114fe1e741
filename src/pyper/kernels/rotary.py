"""Queries, keys and values in one product, turned where they lie, and one pass backward.

Turned in place, queries and keys cost no memory beside the product; values are read from it too.
The backward pass takes the three gradients as attention leaves them and writes the product's
gradient once, where autograd would turn, put together and copy.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyper.kernels import launch
from pyper.kernels.launch import block_of, wide

if launch.HAS_TRITON:
    import triton
    import triton.language as tl


def rotated_heads(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    n_heads: int,
    n_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query (B, H, T, K), key and value (B, kv_heads, T, K) of x (B, T, D), the first two turned.

    weight ((H + 2·kv_heads)·K, D), queries first, values last, with its bias; cos, signed sin:
    (T, 1, K), or (B, T, 1, K) where positions differ by row; both halves turn by the same angles.
    """
    if not launch.runs_triton(x):
        return rotated_heads_torch(x, weight, bias, cos, sin, n_heads, n_kv_heads)
    query, key, value = _RotatedHeads.apply(x, weight, bias, cos, sin, n_heads, n_kv_heads)
    return query, key, value


def rotated_heads_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    n_heads: int,
    n_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The twin of `rotated_heads`, in plain torch."""
    heads = F.linear(x, weight, bias).unflatten(-1, (-1, cos.shape[-1]))
    turned, value = heads.split((n_heads + n_kv_heads, n_kv_heads), dim=2)
    query, key = turned_torch(turned, cos, sin).split((n_heads, n_kv_heads), dim=2)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def turned_torch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, H, K), each pair (x_i, x_{i+K/2}) turned, in plain torch; cos, sin as above."""
    rows = x.to(wide(x.dtype))
    partner = rows.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(rows * cos, partner, sin).to(x.dtype)


class _RotatedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        n_heads: int,
        n_kv_heads: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        (B, T, D), K = x.shape, cos.shape[-1]
        rows = x.reshape(-1, D)
        cos, sin = cos.reshape(-1, K).float(), sin.reshape(-1, K).float()
        product = rotated_product(rows, weight, bias, cos, sin, n_heads + n_kv_heads)
        ctx.save_for_backward(rows, weight, cos, sin)
        heads = product.view(B, T, -1, K).transpose(1, 2)
        query, key, value = heads.split((n_heads, n_kv_heads, n_kv_heads), dim=1)
        return query, key, value

    @staticmethod
    def backward(
        ctx: Any, dquery: Tensor, dkey: Tensor, dvalue: Tensor
    ) -> tuple[Tensor | None, ...]:
        rows, weight, cos, sin = ctx.saved_tensors
        B, _, T, _ = dquery.shape
        needed = ctx.needs_input_grad
        dproduct = rotation_gradient(dquery, dkey, dvalue, cos, sin)
        dx = torch.mm(dproduct, weight).view(B, T, -1) if needed[0] else None
        dweight = torch.mm(dproduct.T, rows) if needed[1] else None
        dbias = dproduct.sum(dim=0) if needed[2] else None
        return dx, dweight, dbias, None, None, None, None


@torch.library.custom_op("pyper::rotated_product", mutates_args=())
def rotated_product(
    rows: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, turned: int
) -> Tensor:
    """rows (N, D) · weight (W, D)ᵀ + bias, its first `turned` heads turned in place; (N, W).

    cos, sin: (P, K) contiguous float32; row n is at position n mod P. One operator with the
    product: only then does nobody else hold what is overwritten.
    """
    product = F.linear(rows, weight, bias)
    turn_in_place(product, cos, sin, turned)
    return product


@rotated_product.register_fake
def _(
    rows: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, turned: int
) -> Tensor:
    return rows.new_empty(len(rows), len(weight))


def turn_in_place(product: Tensor, cos: Tensor, sin: Tensor, turned: int) -> None:
    """The first `turned` heads of rows (N, W); cos, sin (P, K) as of `rotated_product`."""
    half = cos.shape[1] // 2
    block_k = block_of(half, half * 2)
    block_h = block_of(turned, max(1, 2048 // block_k))
    _turn[(len(product), triton.cdiv(turned, block_h))](
        *(product, cos, sin, len(cos)),
        W=product.shape[1],
        H=turned,
        HALF=half,
        BLOCK_H=block_h,
        BLOCK_K=block_k,
        num_warps=4,
    )


@torch.library.custom_op("pyper::rotation_gradient", mutates_args=())
def rotation_gradient(
    dquery: Tensor, dkey: Tensor, dvalue: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """The gradient (B·T, (H + 2·kv_heads)·K) of the product in `rotated_heads`.

    dquery (B, H, T, K), dkey, dvalue (B, kv_heads, T, K), in any order of their dimensions.
    """
    B, H, T, K = dquery.shape
    kv_heads, half = dkey.shape[1], K // 2
    out = dquery.new_empty(B * T, (H + 2 * kv_heads) * K)
    block_k = block_of(half, half * 2)
    parts = [part if part.stride(3) == 1 else part.contiguous() for part in (dquery, dkey, dvalue)]
    _rotation_gradient[(B * T,)](
        *(argument for part in parts for argument in (part, *part.stride()[:3])),
        *(cos, sin, out, T, len(cos)),
        H=H,
        KV_HEADS=kv_heads,
        HALF=half,
        BLOCK_H=block_of(H, max(1, 2048 // block_k)),
        BLOCK_KV=block_of(kv_heads, max(1, 2048 // block_k)),
        BLOCK_K=block_k,
        num_warps=4,
    )
    return out


@rotation_gradient.register_fake
def _(dquery: Tensor, dkey: Tensor, dvalue: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    B, H, T, K = dquery.shape
    return dquery.new_empty(B * T, (H + 2 * dkey.shape[1]) * K)


if launch.HAS_TRITON:

    @triton.jit
    def _turn(
        product_ptr,
        cos_ptr,
        sin_ptr,
        P,
        W: tl.constexpr,
        H: tl.constexpr,
        HALF: tl.constexpr,
        BLOCK_H: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        n = tl.program_id(0)
        h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        k = tl.arange(0, BLOCK_K)
        inside = (h < H)[:, None] & (k < HALF)[None, :]
        at = (n % P) * (2 * HALF) + HALF + k
        cos = tl.load(cos_ptr + at, mask=k < HALF, other=0.0)[None, :]
        sin = tl.load(sin_ptr + at, mask=k < HALF, other=0.0)[None, :]
        left = product_ptr + n.to(tl.int64) * W + (h * (2 * HALF))[:, None] + k[None, :]
        a = tl.load(left, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(left + HALF, mask=inside, other=0.0).to(tl.float32)
        tl.store(left, a * cos - b * sin, mask=inside)
        tl.store(left + HALF, b * cos + a * sin, mask=inside)

    @triton.jit
    def _turn_back(
        from_ptr,
        head_stride,
        to_ptr,
        cos,
        sin,
        H: tl.constexpr,
        HALF: tl.constexpr,
        BLOCK_H: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        """Heads of one token, K numbers each, `head_stride` apart; by the opposite angle."""
        k = tl.arange(0, BLOCK_K)
        for start in tl.static_range(0, H, BLOCK_H):
            h = start + tl.arange(0, BLOCK_H)
            inside = (h < H)[:, None] & (k < HALF)[None, :]
            left = from_ptr + (h.to(tl.int64) * head_stride)[:, None] + k[None, :]
            a = tl.load(left, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(left + HALF, mask=inside, other=0.0).to(tl.float32)
            to = to_ptr + (h * (2 * HALF))[:, None] + k[None, :]
            tl.store(to, a * cos + b * sin, mask=inside)
            tl.store(to + HALF, b * cos - a * sin, mask=inside)

    @triton.jit
    def _rotation_gradient(
        query_ptr,
        query_b,
        query_h,
        query_t,
        key_ptr,
        key_b,
        key_h,
        key_t,
        value_ptr,
        value_b,
        value_h,
        value_t,
        cos_ptr,
        sin_ptr,
        out_ptr,
        T,
        P,
        H: tl.constexpr,
        KV_HEADS: tl.constexpr,
        HALF: tl.constexpr,
        BLOCK_H: tl.constexpr,
        BLOCK_KV: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        n = tl.program_id(0)
        b, t = (n // T).to(tl.int64), (n % T).to(tl.int64)
        k = tl.arange(0, BLOCK_K)
        at = (n % P) * (2 * HALF) + HALF + k
        cos = tl.load(cos_ptr + at, mask=k < HALF, other=0.0)[None, :]
        sin = tl.load(sin_ptr + at, mask=k < HALF, other=0.0)[None, :]
        out_ptr += n.to(tl.int64) * ((H + 2 * KV_HEADS) * 2 * HALF)
        query_ptr += b * query_b + t * query_t
        key_ptr += b * key_b + t * key_t
        value_ptr += b * value_b + t * value_t
        _turn_back(query_ptr, query_h, out_ptr, cos, sin, H, HALF, BLOCK_H, BLOCK_K)
        out_ptr += H * 2 * HALF
        _turn_back(key_ptr, key_h, out_ptr, cos, sin, KV_HEADS, HALF, BLOCK_KV, BLOCK_K)
        out_ptr += KV_HEADS * 2 * HALF
        # Values are not turned: by the angle 0.
        one = tl.full((1, BLOCK_K), 1.0, tl.float32)
        _turn_back(value_ptr, value_h, out_ptr, one, one * 0, KV_HEADS, HALF, BLOCK_KV, BLOCK_K)
