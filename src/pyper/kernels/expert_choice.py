"""A feed-forward layer under expert choice, forward and backward in as few passes as there are.

    router + choice + gather → products around the activation and its gates → combine + residual

The products are cuBLAS's. Of everything else, rows of D or F numbers are read and written once.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyper.config.expert import Activation
from pyper.config.sparse import Gate
from pyper.kernels import launch
from pyper.kernels.activation import (
    activate_rows_torch,
    activation_forward,
    activation_gradients,
)
from pyper.kernels.choice import Choice, choose
from pyper.kernels.gelu_products import down_gradient_gelu, fits, up_gelu
from pyper.kernels.router import (
    logits_gradient,
    router_forward,
    router_gates_torch,
    router_weight_gradient,
)
from pyper.kernels.rows import combine_rows, gather_rows_torch, sum_rows, take_rows


@dataclass(frozen=True)
class ExpertChoiceOutput:
    """What the layer says: its output, and how it routed."""

    out: Tensor
    """(N, D), in the type of x."""
    logits: Tensor
    """(N, E) float32, of the router."""
    gates: Tensor
    """(N, E) float32."""
    choice: Choice


def expert_choice_layer(
    x: Tensor,
    residual: Tensor | None,
    router_weight: Tensor,
    up: Tensor,
    down: Tensor,
    capacity: int,
    *,
    gate: Gate = "softmax",
    activation: Activation = "gelu",
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    padding: Tensor | None = None,
    recompute: bool = False,
) -> ExpertChoiceOutput:
    """out_n = residual_n + Σ_e gates_ne · f_e(x_n), e over the experts that took token n.

    x, residual (N, D), residual 0 without; router_weight (E, D); up (E, F, D), or (E, 2F, D) of
    SwiGLU, with up_bias (E, F); down (E, D, F) with down_bias (E, D); padding (N,), True where
    there is no token. Each expert takes `capacity` tokens, by gates under a softmax, by logits
    under sigmoids. `recompute` computes the hidden rows (E, C, F) again in the backward pass.
    """
    if not launch.runs_triton(x):
        return expert_choice_layer_torch(
            *(x, residual, router_weight, up, down, capacity),
            gate=gate,
            activation=activation,
            up_bias=up_bias,
            down_bias=down_bias,
            padding=padding,
            recompute=recompute,
        )
    rows, logits, gates, *parts = _Route.apply(x, router_weight, capacity, gate, padding)
    choice = Choice(*parts)
    y = expert_feed_forward(
        rows, choice.token_index, gates, up, down, activation, up_bias, recompute=recompute
    )
    start = _with_bias(residual, down_bias, gates, choice.slots)
    out = combine_rows(y, choice.token_index, choice.slots, residual=start)
    return ExpertChoiceOutput(out, logits, gates, choice)


def expert_choice_layer_torch(
    x: Tensor,
    residual: Tensor | None,
    router_weight: Tensor,
    up: Tensor,
    down: Tensor,
    capacity: int,
    *,
    gate: Gate = "softmax",
    activation: Activation = "gelu",
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    padding: Tensor | None = None,
    recompute: bool = False,
) -> ExpertChoiceOutput:
    """The twin of `expert_choice_layer`, in plain torch; `recompute` changes nothing here."""
    logits, gates = router_gates_torch(x, router_weight, gate)
    choice = choose(gates if gate == "softmax" else logits, capacity, padding)
    rows = gather_rows_torch(x, choice.token_index, choice.slots)
    y = expert_feed_forward_torch(rows, choice.token_index, gates, up, down, activation, up_bias)
    start = _with_bias(residual, down_bias, gates, choice.slots)
    out = combine_rows(y, choice.token_index, choice.slots, residual=start)
    return ExpertChoiceOutput(out, logits, gates, choice)


def _with_bias(
    residual: Tensor | None, bias: Tensor | None, gates: Tensor, slots: Tensor
) -> Tensor | None:
    """The residual and the experts' biases, weighed by the gates of those that took a token."""
    if bias is None:
        return residual
    weighed = ((gates * (slots >= 0)) @ bias.to(gates.dtype)).to(bias.dtype)
    return weighed if residual is None else residual + weighed


def expert_feed_forward(
    rows: Tensor,
    token_index: Tensor,
    gates: Tensor,
    up: Tensor,
    down: Tensor,
    activation: Activation = "gelu",
    up_bias: Tensor | None = None,
    *,
    recompute: bool = False,
) -> Tensor:
    """gates_ne · down_e · activation(up_e · rows_ec), (E, C, D), where token n is c-th of expert e.

    Shapes as in `expert_choice_layer`, with rows (E, C, D), token_index (E, C), gates (N, E).
    """
    if not launch.runs_triton(rows):
        return expert_feed_forward_torch(
            rows, token_index, gates, up, down, activation, up_bias, recompute=recompute
        )
    out: Tensor = _ExpertFeedForward.apply(
        rows, token_index, gates, up, down, activation, up_bias, recompute
    )
    return out


def expert_feed_forward_torch(
    rows: Tensor,
    token_index: Tensor,
    gates: Tensor,
    up: Tensor,
    down: Tensor,
    activation: Activation = "gelu",
    up_bias: Tensor | None = None,
    *,
    recompute: bool = False,
) -> Tensor:
    """The twin of `expert_feed_forward`, in plain torch; `recompute` changes nothing here."""
    hidden = activate_rows_torch(_up(rows, up, up_bias), activation, token_index, gates)
    return torch.bmm(hidden, down.mT)


def _up(rows: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return torch.bmm(rows, up.mT)
    return torch.baddbmm(bias.unsqueeze(1), rows, up.mT)


class _Route(torch.autograd.Function):
    """Router, choice and gather as one, so that the gradient of x is written once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, capacity: int, gate: Gate, padding: Tensor | None
    ) -> tuple[Tensor, ...]:
        x, softmax = x.contiguous(), gate == "softmax"
        logits, gates = router_forward(x, weight.contiguous(), softmax)
        choice = choose(gates if softmax else logits, capacity, padding)
        ctx.softmax = softmax
        ctx.save_for_backward(x, weight, gates, choice.slots)
        ctx.mark_non_differentiable(choice.token_index, choice.slots, choice.kth_score)
        rows = take_rows(x, choice.token_index)
        return rows, logits, gates, choice.token_index, choice.slots, choice.kth_score

    @staticmethod
    def backward(
        ctx: Any, drows: Tensor, dlogits: Tensor, dgates: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, gates, slots = ctx.saved_tensors
        total = logits_gradient(dlogits.contiguous(), dgates.contiguous(), gates, ctx.softmax)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            vectors = weight.to(drows.dtype).contiguous()
            dx = sum_rows(drows.contiguous(), slots, None, None, total, vectors)
        if ctx.needs_input_grad[1]:
            dweight = router_weight_gradient(total, x).to(weight.dtype)
        return dx, dweight, None, None, None


class _ExpertFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        token_index: Tensor,
        gates: Tensor,
        up: Tensor,
        down: Tensor,
        activation: Activation,
        up_bias: Tensor | None,
        recompute: bool,
    ) -> Tensor:
        token_index, gates = token_index.contiguous(), gates.contiguous()
        ctx.in_products = fits(rows, up, down, activation, up_bias)
        if ctx.in_products:
            pre, hidden = up_gelu(rows, up, gates, token_index)
        else:
            pre = _up(rows, up, up_bias)
            hidden = activation_forward(pre, activation, token_index, gates)
        kept = None if recompute else hidden
        ctx.save_for_backward(rows, token_index, gates, up, down, pre, kept)
        ctx.activation = activation
        return torch.bmm(hidden, down.mT)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, token_index, gates, up, down, pre, hidden = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if ctx.in_products:
            around = (gates, token_index, hidden is None)
            dpre, dgates, again = down_gradient_gelu(dy, down, pre, *around)
        else:
            around = (token_index, gates, hidden is None)
            dpre, dgates, again = activation_gradients(
                torch.bmm(dy, down), pre, ctx.activation, *around
            )
        hidden = again if hidden is None else hidden
        ddown = torch.bmm(dy.mT, hidden) if needed[4] else None
        drows = torch.bmm(dpre, up) if needed[0] else None
        dup = torch.bmm(dpre.mT, rows) if needed[3] else None
        dbias = dpre.sum(dim=1) if needed[6] else None
        return drows, None, dgates, dup, ddown, None, dbias, None
