"""Activations of hidden rows and the gates that weigh them, one pass forward and one backward.

A gate scales an expert's output; scaling the hidden row before the last product is the same, and
then the backward pass has everything for the gate's gradient in its hands: neither the expert's
output is kept nor read again.

GELU needs Φ, the normal distribution: here Φ(−z) = exp(−z²/2) · t · P(t) with t = 1 / (1 + 0.3 z),
the form of Abramowitz & Stegun 7.1.26, fitted anew with P of degree 7 to a relative error of 1.5e-7
for 0 ≤ z ≤ 14. It shares its only exponential with the derivative and takes a little more than half
the instructions of `erf`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyper.config.expert import Activation
from pyper.kernels import launch
from pyper.kernels.launch import block_of, wide

if launch.HAS_TRITON:
    import triton
    import triton.language as tl


def activate_rows(
    pre: Tensor,
    activation: Activation,
    token_index: Tensor | None = None,
    gates: Tensor | None = None,
) -> Tensor:
    """gates_ne · activation(pre_ec), (E, C, F), where token n is c-th of expert e.

    pre (E, C, F), or gate and value (E, C, 2F) of SwiGLU; token_index (E, C) with gates (N, E)
    float32, or neither. Only pre is kept for the backward pass.
    """
    if not launch.runs_triton(pre):
        return activate_rows_torch(pre, activation, token_index, gates)
    out: Tensor = _ActivateRows.apply(pre, activation, token_index, gates)
    return out


def activate_rows_torch(
    pre: Tensor,
    activation: Activation,
    token_index: Tensor | None = None,
    gates: Tensor | None = None,
) -> Tensor:
    """The twin of `activate_rows`, in plain torch."""
    hidden = activate(pre.to(wide(pre.dtype)), activation)
    if gates is not None and token_index is not None:
        hidden = hidden * gates.T.gather(1, token_index).unsqueeze(-1)
    return hidden.to(pre.dtype)


def activate(pre: Tensor, activation: Activation) -> Tensor:
    """The activation of (..., F), or of gate and value (..., 2F) of SwiGLU (arXiv:2002.05202).

    `gelu` is x·Φ(x) with the error function, `gelu_tanh` its tanh approximation (they differ by up
    to 4.7e-4), `relu2` is max(x, 0)² (arXiv:2109.08668).
    """
    if activation == "swiglu":
        gate, value = pre.chunk(2, dim=-1)
        return F.silu(gate) * value
    if activation == "relu2":
        return torch.square(F.relu(pre))
    return F.gelu(pre, approximate="tanh" if activation == "gelu_tanh" else "none")


class _ActivateRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pre: Tensor,
        activation: Activation,
        token_index: Tensor | None,
        gates: Tensor | None,
    ) -> Tensor:
        pre = pre.contiguous()
        token_index = None if token_index is None else token_index.contiguous()
        gates = None if gates is None else gates.contiguous()
        ctx.save_for_backward(pre, token_index, gates)
        ctx.activation = activation
        return activation_forward(pre, activation, token_index, gates)

    @staticmethod
    def backward(ctx: Any, dhidden: Tensor) -> tuple[Tensor | None, ...]:
        pre, token_index, gates = ctx.saved_tensors
        dpre, dgates, _ = activation_gradients(
            dhidden.contiguous(), pre, ctx.activation, token_index, gates, False
        )
        return dpre, None, None, None if gates is None else dgates


@torch.library.custom_op("pyper::activation_forward", mutates_args=())
def activation_forward(
    pre: Tensor, activation: str, token_index: Tensor | None, gates: Tensor | None
) -> Tensor:
    """`activate_rows` of contiguous tensors, without gradient."""
    hidden = _hidden_of(pre, activation)
    E, C, d_ff = hidden.shape
    block = block_of(d_ff, 4096)
    _activation_forward[(E * C, triton.cdiv(d_ff, block))](
        *(pre, token_index, gates, hidden, C),
        F=d_ff,
        E=E,
        ACTIVATION=activation,
        HAS_GATES=gates is not None,
        BLOCK_F=block,
        num_warps=_warps(block),
    )
    return hidden


@activation_forward.register_fake
def _(pre: Tensor, activation: str, token_index: Tensor | None, gates: Tensor | None) -> Tensor:
    return _hidden_of(pre, activation)


@torch.library.custom_op("pyper::activation_gradients", mutates_args=())
def activation_gradients(
    dhidden: Tensor,
    pre: Tensor,
    activation: str,
    token_index: Tensor | None,
    gates: Tensor | None,
    want_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of pre and gates in `activate_rows`, and the hidden rows again if wanted.

    All contiguous. What is not asked for comes back empty.
    """
    dpre, dgates, hidden = _gradients_of(dhidden, pre, gates, want_hidden)
    E, C, d_ff = dhidden.shape
    block = block_of(d_ff, 4096)
    _activation_gradients[(E * C,)](
        *(dhidden, pre, token_index, gates, dpre, dgates, hidden, C),
        F=d_ff,
        E=E,
        ACTIVATION=activation,
        HAS_GATES=gates is not None,
        WANT_HIDDEN=want_hidden,
        BLOCK_F=block,
        num_warps=_warps(block),
    )
    return dpre, dgates, hidden


@activation_gradients.register_fake
def _(
    dhidden: Tensor,
    pre: Tensor,
    activation: str,
    token_index: Tensor | None,
    gates: Tensor | None,
    want_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients_of(dhidden, pre, gates, want_hidden)


def _hidden_of(pre: Tensor, activation: str) -> Tensor:
    E, C, width = pre.shape
    return pre.new_empty(E, C, width // 2 if activation == "swiglu" else width)


def _gradients_of(
    dhidden: Tensor, pre: Tensor, gates: Tensor | None, want_hidden: bool
) -> tuple[Tensor, Tensor, Tensor]:
    # Tokens that nobody took have no gradient in their gates.
    dgates = pre.new_empty(0) if gates is None else torch.zeros_like(gates)
    hidden = torch.empty_like(dhidden) if want_hidden else pre.new_empty(0)
    return torch.empty_like(pre), dgates, hidden


def _warps(block: int) -> int:
    """16 numbers for each thread: two loads of 16 bytes in bf16."""
    return max(1, min(8, block // 512))


if launch.HAS_TRITON:

    @triton.jit
    def _normal_tail(x):
        """(1 − Φ(|x|), exp(−x² / 2)); see the head of this file."""
        d = 1.0 + 0.3 * tl.abs(x)
        t = tl.rsqrt(d * d)  # 1 / d without the range checks of a division
        p = 0.03567487578764282
        p = p * t - 0.1572034953122272
        p = p * t + 0.20635418971261807
        p = p * t - 0.05368424076914695
        p = p * t + 0.12856192203874425
        p = p * t + 0.09991340932037784
        p = p * t + 0.1207539681722054
        p = p * t + 0.11962929811061769
        bell = tl.exp2(x * x * -0.7213475204444817)
        return p * t * bell, bell

    @triton.jit
    def _sigmoid(x):
        return 1.0 / (1.0 + tl.exp(-x))

    @triton.jit
    def _value_and_slope(x, ACTIVATION: tl.constexpr):
        """The activation of x and its derivative; of SwiGLU's gate alone."""
        if ACTIVATION == "gelu":
            tail, bell = _normal_tail(x)
            value = tl.maximum(x, 0.0) - tl.abs(x) * tail
            slope = tl.where(x > 0, 1.0 - tail, tail) + x * bell * 0.3989422804014327
        elif ACTIVATION == "gelu_tanh":
            s = _sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
            value = x * s
            inner = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
            slope = s + value * (1.0 - s) * inner
        elif ACTIVATION == "relu2":
            r = tl.maximum(x, 0.0)
            value = r * r
            slope = 2.0 * r
        else:
            s = _sigmoid(x)
            value = x * s
            slope = s + value * (1.0 - s)
        return value, slope

    @triton.jit
    def _activation_forward(
        pre_ptr,
        index_ptr,
        gates_ptr,
        hidden_ptr,
        C,
        F: tl.constexpr,
        E: tl.constexpr,
        ACTIVATION: tl.constexpr,
        HAS_GATES: tl.constexpr,
        BLOCK_F: tl.constexpr,
    ):
        r = tl.program_id(0).to(tl.int64)
        f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
        width = 2 * F if ACTIVATION == "swiglu" else F
        x = tl.load(pre_ptr + r * width + f, mask=f < F, other=0.0).to(tl.float32)
        hidden, _ = _value_and_slope(x, ACTIVATION)
        if ACTIVATION == "swiglu":
            hidden *= tl.load(pre_ptr + r * width + F + f, mask=f < F, other=0.0).to(tl.float32)
        if HAS_GATES:
            hidden *= tl.load(gates_ptr + tl.load(index_ptr + r) * E + r // C)
        tl.store(hidden_ptr + r * F + f, hidden, mask=f < F)

    @triton.jit
    def _activation_gradients(
        dhidden_ptr,
        pre_ptr,
        index_ptr,
        gates_ptr,
        dpre_ptr,
        dgates_ptr,
        hidden_ptr,
        C,
        F: tl.constexpr,
        E: tl.constexpr,
        ACTIVATION: tl.constexpr,
        HAS_GATES: tl.constexpr,
        WANT_HIDDEN: tl.constexpr,
        BLOCK_F: tl.constexpr,
    ):
        r = tl.program_id(0).to(tl.int64)
        width = 2 * F if ACTIVATION == "swiglu" else F
        gate = 1.0
        at = r
        if HAS_GATES:
            at = tl.load(index_ptr + r) * E + r // C
            gate = tl.load(gates_ptr + at)
        dot = tl.zeros((BLOCK_F,), dtype=tl.float32)
        for start in range(0, F, BLOCK_F):
            f = start + tl.arange(0, BLOCK_F)
            x = tl.load(pre_ptr + r * width + f, mask=f < F, other=0.0).to(tl.float32)
            dhidden = tl.load(dhidden_ptr + r * F + f, mask=f < F, other=0.0).to(tl.float32)
            hidden, slope = _value_and_slope(x, ACTIVATION)
            if ACTIVATION == "swiglu":
                up = tl.load(pre_ptr + r * width + F + f, mask=f < F, other=0.0).to(tl.float32)
                tl.store(dpre_ptr + r * width + F + f, gate * dhidden * hidden, mask=f < F)
                hidden *= up
                slope *= up
            tl.store(dpre_ptr + r * width + f, gate * dhidden * slope, mask=f < F)
            if WANT_HIDDEN:
                tl.store(hidden_ptr + r * F + f, gate * hidden, mask=f < F)
            if HAS_GATES:
                dot += dhidden * hidden
        if HAS_GATES:
            tl.store(dgates_ptr + at, tl.sum(dot, axis=0))
