"""Queries, keys and values in one product of 8-bit floats, turned where they lie."""

from typing import Any

import torch
from torch import Tensor

from pyper.kernels import launch
from pyper.kernels.fp8_cast import E4M3, E5M2, to_fp8
from pyper.kernels.fp8_products import FAST_BACKWARD, fp8_linear, product
from pyper.kernels.rotary import rotation_gradient, turn_in_place, turned_torch


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
        needed, settings = ctx.needs_input_grad, (dquery.dtype, FAST_BACKWARD)
        g = to_fp8(rotation_gradient(dquery, dkey, dvalue, cos, sin), E5M2)
        dx = product(g.rows, weight, g.scale, w_scale, *settings) if needed[0] else None
        dx = None if dx is None else dx.view(len(dquery), dquery.shape[2], -1)
        dweight = product(g.columns, columns, g.scale, scale, *settings) if needed[1] else None
        return dx, dweight, None, None, None, None


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
    heads = product(rows, weight, scale, w_scale, dtype, True)
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
