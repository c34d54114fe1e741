"""A linear map of a few rows, bound by reading its weights: decoding.

A product of so few rows leaves the arithmetic idle; what counts is that the weights stream without
a pause. So whatever stands before and behind it is done on the way: the norm of its input, widening
of eight-bit weights, bias, activation, residual. The norm's scale is of a row and comes after the
sum, Σ w·g·x / √(mean(x²) + eps), so nothing is read twice.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pyper.config.expert import Activation
from pyper.kernels import launch
from pyper.kernels.activation import activate
from pyper.kernels.launch import block_of
from pyper.kernels.overlap import overlap_options
from pyper.kernels.row_linear import linear_of_row, takes

if launch.HAS_TRITON:
    import triton
    import triton.language as tl

    from pyper.kernels.activation import _value_and_slope
    from pyper.kernels.overlap import ask_ahead, wait_for_others

MOST_ROWS = 64
"""With more, the product is bound by arithmetic, and a library's is faster."""


@dataclass(frozen=True)
class ThinWeight:
    """A matrix (N, D), in the type of the rows, int8 or float8_e4m3fn; eight bits need a scale."""

    weight: Tensor
    scale: Tensor | None = None
    """(N,), of each row."""
    bias: Tensor | None = None
    """(N,)."""


@dataclass(frozen=True)
class InputNorm:
    """RMS normalisation of the input's rows."""

    gain: Tensor
    """(D,)."""
    eps: float


def thin_linear(
    x: Tensor,
    weight: ThinWeight,
    *,
    norm: InputNorm | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
    overlap: bool = False,
) -> Tensor:
    """residual + activation(weight · norm(x) + bias), (B, N), of x (B, D); without gradient.

    SwiGLU's matrix holds the gates' rows, then the values': the result has half as many columns.
    overlap: read the weight while the kernel before still runs; that one must not have written it.
    """
    if not (launch.runs_triton(x) and x.dtype == torch.bfloat16 and len(x) <= MOST_ROWS):
        return thin_linear_torch(x, weight, norm=norm, activation=activation, residual=residual)
    gain, eps = (norm.gain, norm.eps) if norm else (None, 0.0)
    return _thin_linear_op(
        x, weight.weight, weight.scale, weight.bias, gain, eps, activation or "", residual, overlap
    )


def thin_linear_torch(
    x: Tensor,
    weight: ThinWeight,
    *,
    norm: InputNorm | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The twin of `thin_linear`, in plain torch."""
    if norm is not None:
        x = F.rms_norm(x, (x.shape[-1],), norm.gain, norm.eps)
    out = F.linear(x, weight.weight.to(x.dtype))
    if weight.scale is not None:
        out = (out * weight.scale).to(x.dtype)
    if weight.bias is not None:
        out = out + weight.bias
    if activation is not None:
        out = activate(out, activation)
    return out if residual is None else residual + out


@torch.library.custom_op("pyper::thin_linear", mutates_args=())
def _thin_linear_op(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    eps: float,
    activation: str,
    residual: Tensor | None,
    overlap: bool,
) -> Tensor:
    """All contiguous, x (B, D) bf16."""
    out = _out_of(x, weight, activation)
    (B, D), N = x.shape, out.shape[1]
    if B == 1 and takes(weight):
        linear_of_row(x, weight, scale, bias, gain, eps, activation, residual, out, overlap)
        return out
    block_n, block_d, stages, warps = _blocks(N, B)
    _thin_linear[(triton.cdiv(N, block_n),)](
        *(x, weight, scale, bias, gain, residual, out, B, eps),
        N=N,
        D=D,
        ACTIVATION=activation,
        HAS_NORM=gain is not None,
        HAS_SCALE=scale is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        BLOCK_B=max(block_of(B, MOST_ROWS), 16),
        BLOCK_N=block_n,
        BLOCK_D=min(block_d, max(block_of(D, 1 << 20), 16)),
        LINES=_ahead(D * weight.element_size()),
        num_stages=stages,
        num_warps=warps,
        **overlap_options(overlap, x.device),
    )
    return out


@_thin_linear_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    eps: float,
    activation: str,
    residual: Tensor | None,
    overlap: bool,
) -> Tensor:
    return _out_of(x, weight, activation)


def _out_of(x: Tensor, weight: Tensor, activation: str) -> Tensor:
    return x.new_empty(len(x), len(weight) // 2 if activation == "swiglu" else len(weight))


def _blocks(n_outputs: int, n_rows: int) -> tuple[int, int, int, int]:
    """Columns of the output and of the input, stages and warps of a program.

    Each of a large GPU's processors should have a program at least, and some 32 kB on their way.
    """
    if n_outputs <= 4096:
        return 16, 256, 4, 4
    return 64, 256, (4 if n_rows <= 16 else 3), 4


def _ahead(row_bytes: int) -> int:
    """Lines of 128 bytes of each weight row that are asked for before there is a use for them."""
    lines = max(row_bytes // 128, 1)
    return min(1 << (lines.bit_length() - 1), 16)


if launch.HAS_TRITON:

    @triton.jit
    def _widened(w, x):
        if w.dtype == tl.int8:
            w = w.to(tl.float32)  # every integer of eight bits is exact in bf16
        return w.to(x.dtype)

    @triton.jit
    def _row_epilogue(sums, n, scale_ptr, bias_ptr, N_ROWS, HAS_SCALE, HAS_BIAS):
        """Scale and bias of output rows n; sums (BLOCK_N, BLOCK_B)."""
        if HAS_SCALE:
            sums *= tl.load(scale_ptr + n, mask=n < N_ROWS, other=0.0).to(tl.float32)[:, None]
        if HAS_BIAS:
            sums += tl.load(bias_ptr + n, mask=n < N_ROWS, other=0.0).to(tl.float32)[:, None]
        return sums

    @triton.jit
    def _thin_linear(
        x_ptr,
        weight_ptr,
        scale_ptr,
        bias_ptr,
        gain_ptr,
        residual_ptr,
        out_ptr,
        B,
        eps,
        N: tl.constexpr,
        D: tl.constexpr,
        ACTIVATION: tl.constexpr,
        HAS_NORM: tl.constexpr,
        HAS_SCALE: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
        BLOCK_B: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_D: tl.constexpr,
        LINES: tl.constexpr,
        OVERLAP: tl.constexpr = False,
    ):
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        b = tl.arange(0, BLOCK_B)
        GATED: tl.constexpr = ACTIVATION == "swiglu"
        N_ROWS: tl.constexpr = 2 * N if GATED else N
        weight_rows = weight_ptr + n.to(tl.int64)[:, None] * D
        sums = tl.zeros((BLOCK_N, BLOCK_B), dtype=tl.float32)
        values = tl.zeros((BLOCK_N, BLOCK_B), dtype=tl.float32)
        squares = tl.zeros((BLOCK_B,), dtype=tl.float32)
        if OVERLAP:
            IN_LINE: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth
            line = tl.minimum(n, N - 1).to(tl.int64)[:, None] * D
            ask_ahead(weight_ptr + line + tl.arange(0, LINES)[None, :] * IN_LINE)
        wait_for_others(OVERLAP)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            inside = (d < D)[:, None] & (b < B)[None, :]
            x = tl.load(x_ptr + b[None, :] * D + d[:, None], mask=inside, other=0.0)
            known = (n < N)[:, None] & (d < D)[None, :]
            w = tl.load(weight_rows + d[None, :], mask=known, other=0.0)
            if HAS_NORM:
                wide = x.to(tl.float32)
                squares += tl.sum(wide * wide, axis=0)
                gain = tl.load(gain_ptr + d, mask=d < D, other=0.0).to(tl.float32)
                x = (wide * gain[:, None]).to(x_ptr.dtype.element_ty)
            sums = tl.dot(_widened(w, x), x, sums)
            if GATED:
                w = tl.load(weight_rows + N * D + d[None, :], mask=known, other=0.0)
                values = tl.dot(_widened(w, x), x, values)
        if HAS_NORM:
            scale = tl.rsqrt(squares / D + eps)[None, :]
            sums *= scale
            values *= scale
        sums = _row_epilogue(sums, n, scale_ptr, bias_ptr, N_ROWS, HAS_SCALE, HAS_BIAS)
        if ACTIVATION != "":
            sums, _ = _value_and_slope(sums, ACTIVATION)
        if GATED:
            sums *= _row_epilogue(values, N + n, scale_ptr, bias_ptr, N_ROWS, HAS_SCALE, HAS_BIAS)
        at = b.to(tl.int64)[None, :] * N + n[:, None]
        there = (n < N)[:, None] & (b < B)[None, :]
        if HAS_RESIDUAL:
            # As two operations would: the product is rounded before it is added.
            sums = sums.to(out_ptr.dtype.element_ty).to(tl.float32)
            sums += tl.load(residual_ptr + at, mask=there, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, sums, mask=there)
