"""A dense feed-forward in training as one function, which keeps rows of F numbers once.

Left to itself, autograd keeps what goes into the activation and what comes out. Here the backward
pass computes the latter again while it reads the former anyway: one write, and no memory between.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyper.config.expert import Activation
from pyper.kernels import launch
from pyper.kernels.activation import activate, activation_forward, activation_gradients
from pyper.kernels.gelu_products import down_gradient_gelu, fits, up_gelu


def dense_feed_forward(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    activation: Activation = "gelu",
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """down · activation(up · x + up_bias) + down_bias, (..., D), of x (..., D).

    up (F, D), or (2F, D) of SwiGLU, with up_bias (F,) or (2F,); down (D, F) with down_bias (D,).
    """
    if not launch.runs_triton(x):
        return dense_feed_forward_torch(x, up, down, activation, up_bias, down_bias)
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = _DenseFeedForward.apply(rows, up, down, activation, up_bias, down_bias)
    return out.view(*x.shape[:-1], -1)


def dense_feed_forward_torch(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    activation: Activation = "gelu",
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """The twin of `dense_feed_forward`, in plain torch."""
    return F.linear(activate(F.linear(x, up, up_bias), activation), down, down_bias)


class _DenseFeedForward(torch.autograd.Function):
    """Of rows (N, D)."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        up: Tensor,
        down: Tensor,
        activation: Activation,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
    ) -> Tensor:
        # To the kernels this is one expert that reads every row.
        one = (rows.unsqueeze(0), up.unsqueeze(0))
        ctx.in_products = fits(*one, down.unsqueeze(0), activation, up_bias)
        if ctx.in_products:
            pre, hidden = (x.squeeze(0) for x in up_gelu(*one, None, None))
        else:
            pre = F.linear(rows, up, up_bias)
            hidden = activation_forward(pre.unsqueeze(0), activation, None, None).squeeze(0)
        ctx.save_for_backward(rows, up, down, pre)
        ctx.activation = activation
        return F.linear(hidden, down, down_bias)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        rows, up, down, pre = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if ctx.in_products:
            one = (dout.unsqueeze(0), down.unsqueeze(0), pre.unsqueeze(0))
            dpre, _, hidden = down_gradient_gelu(*one, None, None, needed[2])
        else:
            dhidden = torch.mm(dout, down).unsqueeze(0)
            dpre, _, hidden = activation_gradients(
                dhidden, pre.unsqueeze(0), ctx.activation, None, None, needed[2]
            )
        dpre = dpre.squeeze(0)
        drows = torch.mm(dpre, up) if needed[0] else None
        dup = torch.mm(dpre.T, rows) if needed[1] else None
        ddown = torch.mm(dout.T, hidden.squeeze(0)) if needed[2] else None
        dup_bias = dpre.sum(dim=0) if needed[4] else None
        ddown_bias = dout.sum(dim=0) if needed[5] else None
        return drows, dup, ddown, None, dup_bias, ddown_bias
