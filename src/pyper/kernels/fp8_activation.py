"""GELU on its way into 8 bits, forward and backward: hidden rows in 16 bits are never written.

The backward pass computes them again, transposed, while it reads what went into GELU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pyper.kernels import launch
from pyper.kernels.fp8_cast import E4M3, E5M2
from pyper.kernels.launch import wide

if launch.HAS_TRITON:
    import triton
    import triton.language as tl

    from pyper.kernels.activation import _value_and_slope
    from pyper.kernels.fp8_cast import _side_by_side

ACTIVATIONS = ("gelu", "gelu_tanh")
"""|activation(z)| ≤ |z|, and its slope is at most `STEEPEST`."""
STEEPEST = 1.13
_BLOCK, _PAIRS, _BLOCK_F = 4096, 64, 32


def hidden_to_fp8(pre: Tensor, inverse: Tensor, activation: str) -> Tensor:
    """activation(pre) · inverse in e4m3, (N, F), of pre (N, F)."""
    f = hidden_forward if _by_kernel(pre) else hidden_to_fp8_torch
    return f(pre, inverse, activation)


def hidden_to_fp8_torch(pre: Tensor, inverse: Tensor, activation: str) -> Tensor:
    """The twin of `hidden_to_fp8`, in plain torch."""
    return (_activated(pre, activation) * inverse).to(E4M3)


def gradients_to_fp8(
    dhidden: Tensor, pre: Tensor, inverse: Tensor, hidden_inverse: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """dpre · inverse in e5m2, (N, F) and (F, N), and hidden · hidden_inverse in e4m3, (F, N).

    N is even.
    """
    f = hidden_gradients if _by_kernel(pre) else gradients_to_fp8_torch
    return f(dhidden, pre, inverse, hidden_inverse, activation)


def gradients_to_fp8_torch(
    dhidden: Tensor, pre: Tensor, inverse: Tensor, hidden_inverse: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The twin of `gradients_to_fp8`, in plain torch."""
    hidden = (_activated(pre, activation) * hidden_inverse).to(E4M3)
    dpre = (dhidden.to(wide(pre.dtype)) * _slope(pre, activation) * inverse).to(E5M2)
    return dpre, dpre.t().contiguous(), hidden.t().contiguous()


def _by_kernel(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and launch.runs_triton(x)


def _activated(pre: Tensor, activation: str) -> Tensor:
    return F.gelu(pre.to(wide(pre.dtype)), approximate=_form(activation))


def _slope(pre: Tensor, activation: str) -> Tensor:
    z = pre.to(wide(pre.dtype))
    return torch.ops.aten.gelu_backward(torch.ones_like(z), z, approximate=_form(activation))


def _form(activation: str) -> str:
    return "tanh" if activation == "gelu_tanh" else "none"


@torch.library.custom_op("pyper::fp8_hidden_forward", mutates_args=())
def hidden_forward(pre: Tensor, inverse: Tensor, activation: str) -> Tensor:
    """`hidden_to_fp8` of bf16."""
    pre = pre.contiguous()
    hidden = torch.empty_like(pre, dtype=E4M3)
    _hidden_forward[(triton.cdiv(pre.numel(), _BLOCK),)](
        *(pre, inverse, hidden, pre.numel()), ACTIVATION=activation, BLOCK=_BLOCK, num_warps=8
    )
    return hidden


@hidden_forward.register_fake
def _(pre: Tensor, inverse: Tensor, activation: str) -> Tensor:
    return pre.new_empty(pre.shape, dtype=E4M3)


@torch.library.custom_op("pyper::fp8_hidden_gradients", mutates_args=())
def hidden_gradients(
    dhidden: Tensor, pre: Tensor, inverse: Tensor, hidden_inverse: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`gradients_to_fp8` of bf16."""
    dhidden, pre = dhidden.contiguous(), pre.contiguous()
    dpre, columns, hidden = _gradients_of(pre)
    d_ff, pairs = pre.shape[1], len(pre) // 2
    transposed = (columns.view(torch.int16), hidden.view(torch.int16))
    _hidden_gradients[(triton.cdiv(pairs, _PAIRS) * triton.cdiv(d_ff, _BLOCK_F),)](
        *(dhidden, pre, inverse, hidden_inverse, dpre, *transposed, pairs, d_ff),
        HIDDEN=tl.float8e4nv,
        ACTIVATION=activation,
        PAIRS=_PAIRS,
        BLOCK_F=_BLOCK_F,
        num_warps=8,
    )
    return dpre, columns, hidden


@hidden_gradients.register_fake
def _(
    dhidden: Tensor, pre: Tensor, inverse: Tensor, hidden_inverse: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients_of(pre)


def _gradients_of(pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    N, d_ff = pre.shape
    shapes = (((N, d_ff), E5M2), ((d_ff, N), E5M2), ((d_ff, N), E4M3))
    dpre, columns, hidden = (pre.new_empty(shape, dtype=dtype) for shape, dtype in shapes)
    return dpre, columns, hidden


if launch.HAS_TRITON:

    @triton.jit
    def _hidden_forward(
        pre_ptr, inverse_ptr, hidden_ptr, n, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
    ):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(pre_ptr + at, mask=at < n, other=0.0).to(tl.float32)
        hidden, _ = _value_and_slope(x, ACTIVATION)
        narrow = (hidden * tl.load(inverse_ptr)).to(hidden_ptr.dtype.element_ty)
        tl.store(hidden_ptr + at, narrow, mask=at < n)

    @triton.jit
    def _row_gradients(
        dhidden_ptr,
        pre_ptr,
        dpre_ptr,
        at,
        inside,
        inverse,
        hidden_inverse,
        ACTIVATION: tl.constexpr,
    ):
        """Stores dpre; and gives it and the hidden rows before they were narrowed."""
        x = tl.load(pre_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dhidden = tl.load(dhidden_ptr + at, mask=inside, other=0.0).to(tl.float32)
        value, slope = _value_and_slope(x, ACTIVATION)
        dpre = dhidden * slope * inverse
        tl.store(dpre_ptr + at, dpre.to(dpre_ptr.dtype.element_ty), mask=inside)
        return dpre, value * hidden_inverse

    @triton.jit
    def _hidden_gradients(
        dhidden_ptr,
        pre_ptr,
        inverse_ptr,
        hidden_inverse_ptr,
        dpre_ptr,
        columns_ptr,
        hidden_ptr,
        P,
        F,
        HIDDEN: tl.constexpr,
        ACTIVATION: tl.constexpr,
        PAIRS: tl.constexpr,
        BLOCK_F: tl.constexpr,
    ):
        across = tl.cdiv(F, BLOCK_F)
        pair = tl.program_id(0) // across * PAIRS + tl.arange(0, PAIRS)
        f = tl.program_id(0) % across * BLOCK_F + tl.arange(0, BLOCK_F)
        inside = (pair < P)[:, None] & (f < F)[None, :]
        at = (2 * pair).to(tl.int64)[:, None] * F + f[None, :]
        inverse, hidden_inverse = tl.load(inverse_ptr), tl.load(hidden_inverse_ptr)
        even, even_hidden = _row_gradients(
            dhidden_ptr, pre_ptr, dpre_ptr, at, inside, inverse, hidden_inverse, ACTIVATION
        )
        at += F
        odd, odd_hidden = _row_gradients(
            dhidden_ptr, pre_ptr, dpre_ptr, at, inside, inverse, hidden_inverse, ACTIVATION
        )
        # Of two rows, neighbours in a column: 16 bits are transposed in one instruction, 8 are not.
        dpre = _side_by_side(even, odd, dpre_ptr.dtype.element_ty)
        hidden = _side_by_side(even_hidden, odd_hidden, HIDDEN)
        inside = (f < F)[:, None] & (pair < P)[None, :]
        at = f.to(tl.int64)[:, None] * P + pair[None, :]
        tl.store(columns_ptr + at, tl.trans(dpre), mask=inside)
        tl.store(hidden_ptr + at, tl.trans(hidden), mask=inside)
