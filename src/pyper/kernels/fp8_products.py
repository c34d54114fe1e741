"""Products of 8-bit floats in training, whose factors are cast once for all three of them.

Forward x · Wᵀ, backward g · W and gᵀ · x: x and W are read once and written in both layouts, the
second for the backward pass; so is g. Activations and weights are e4m3, gradients e5m2 (more range,
less precision); sums are in float32 or better, results in the type of x.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from pyper.config.expert import Activation
from pyper.kernels.fp8_activation import STEEPEST, gradients_to_fp8, hidden_to_fp8
from pyper.kernels.fp8_cast import E4M3, E5M2, largest_and_norm_of, largest_of, scales, to_fp8

MULTIPLE = 16
"""All sizes of 8-bit products are multiples of it."""
Way = Literal["forward", "input", "weight"]
FAST: dict[Way, bool] = {"forward": True, "input": False, "weight": False}
"""Which products add up in some 14 bits: faster, and good enough forwards. Gradients of weights are
sums over all tokens, which cancel: there a percent or two may be lost, and nobody has tried."""
# Factors in 8 bits may be larger than they were by a sixteenth (e4m3) or an eighth (e5m2).
_ROOM = 1.25


def fp8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, in) · weight (out, in)ᵀ; all sizes multiples of `MULTIPLE`."""
    out: Tensor = _Linear.apply(x, weight)
    return out


def fp8_feed_forward(x: Tensor, up: Tensor, down: Tensor, activation: Activation) -> Tensor:
    """down · activation(up · x), (N, D), of x (N, D), up (F, D) and down (D, F).

    Rows of F numbers are kept once, as they go into the activation; what comes out of it exists in
    8 bits alone. Its scale is from a bound, since |activation(z)| ≤ |z| ≤ ‖up_f‖ · ‖x_n‖, and so is
    that of its gradient: no pass looks for the largest of N · F numbers.
    """
    out: Tensor = _FeedForward.apply(x, up, down, activation)
    return out


def product(
    way: Way,
    left: Tensor,
    right: Tensor,
    left_scale: Tensor,
    right_scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """left (n, k) · right (m, k)ᵀ, both contiguous: the one layout that tensor cores take."""
    out: Tensor = torch._scaled_mm(
        left, right.t(), left_scale, right_scale, out_dtype=dtype, use_fast_accum=FAST[way]
    )
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x8, w8 = to_fp8(x, E4M3), to_fp8(weight, E4M3)
        ctx.save_for_backward(x8.columns, x8.scale, w8.columns, w8.scale)
        return product("forward", x8.rows, w8.rows, x8.scale, w8.scale, x.dtype)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        columns, scale, weight, w_scale = ctx.saved_tensors
        needed, dtype = ctx.needs_input_grad, dout.dtype
        g = to_fp8(dout, E5M2)
        dx = product("input", g.rows, weight, g.scale, w_scale, dtype) if needed[0] else None
        dweight = (
            product("weight", g.columns, columns, g.scale, scale, dtype) if needed[1] else None
        )
        return dx, dweight


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor, activation: Activation) -> Tensor:
        # 1. what goes into the activation
        (x_largest, x_norm), (up_largest, up_norm) = largest_and_norm_of(x), largest_and_norm_of(up)
        x8, up8 = to_fp8(x, E4M3, x_largest), to_fp8(up, E4M3, up_largest)
        pre = product("forward", x8.rows, up8.rows, x8.scale, up8.scale, x.dtype)

        # 2. what comes out of it, from its bound
        inverse, scale = scales(_ROOM * x_norm * up_norm, E4M3)
        hidden = hidden_to_fp8(pre, inverse, activation)
        down_largest = largest_of(down)
        down8 = to_fp8(down, E4M3, down_largest)
        ctx.save_for_backward(
            *(x8.columns, x8.scale, up8.columns, up8.scale, pre),
            *(inverse, scale, down8.columns, down8.scale, down_largest),
        )
        ctx.activation = activation
        return product("forward", hidden, down8.rows, scale, down8.scale, x.dtype)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        columns, x_scale, up, up_scale, pre, inverse, scale, down, down_scale, down_largest = (
            ctx.saved_tensors
        )
        needed, dtype = ctx.needs_input_grad, dout.dtype
        largest, norm = largest_and_norm_of(dout)
        g = to_fp8(dout, E5M2, largest)
        dhidden = product("input", g.rows, down, g.scale, down_scale, dtype)

        # No column of `down` is longer than √D times its largest number.
        bound = _ROOM * STEEPEST * norm * down_largest * dout.shape[1] ** 0.5
        dpre_inverse, dpre_scale = scales(bound, E5M2)
        dpre, dpre_columns, hidden = gradients_to_fp8(
            dhidden, pre, dpre_inverse, inverse, ctx.activation
        )
        dx = product("input", dpre, up, dpre_scale, up_scale, dtype) if needed[0] else None
        up_factors = (dpre_columns, columns, dpre_scale, x_scale)
        dup = product("weight", *up_factors, dtype) if needed[1] else None
        down_factors = (g.columns, hidden, g.scale, scale)
        ddown = product("weight", *down_factors, dtype) if needed[2] else None
        return dx, dup, ddown, None
