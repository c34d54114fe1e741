"""A linear map of a few rows, bound by reading its weights: decoding.

A product of so few rows leaves the arithmetic idle; what counts is that the weights stream without
a pause. So whatever stands before and behind it is done on the way: the norm of its input, widening
of eight-bit weights, bias, activation, residual. The norm's scale is of a row and comes after the
sum, Σ w·g·x / √(mean(x²) + eps), so nothing is read twice; where a product knows which norm comes
next, it writes g·x as well, which then takes the short way into the next product.

Every program reads all of x that it needs, from the cache: with many rows that is as much as the
weights. Blocks of few outputs would read it too often, so a program takes more outputs and a part
of the inputs, and the last one to end adds up the parts.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pyper.config.expert import Activation
from pyper.kernels import launch
from pyper.kernels.activation import activate
from pyper.kernels.overlap import overlap_options
from pyper.kernels.row_linear import linear_of_row, takes
from pyper.kernels.thin_blocks import (
    MOST_ROWS,
    Blocks,
    blocks_of,
    lines_ahead,
    n_outputs_of,
    row_block,
)
from pyper.kernels.thin_stream import stream_fits, stream_rows

if launch.HAS_TRITON:
    from pyper.kernels.thin_linear_kernel import thin_linear_block


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


@dataclass(frozen=True)
class ThinRows:
    """Rows (B, D), and what the product that wrote them has done for the norm they go through."""

    rows: Tensor
    scaled: Tensor | None = None
    """rows · gain (B, D)."""
    squares: Tensor | None = None
    """(n, B) float32, parts of the sum of a row's squares."""


def thin_linear(
    x: Tensor | ThinRows,
    weight: ThinWeight,
    *,
    norm: InputNorm | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
    tickets: Tensor | None = None,
    overlap: bool = False,
) -> Tensor:
    """residual + activation(weight · norm(x) + bias), (B, N), of x (B, D); without gradient.

    SwiGLU's matrix holds the gates' rows, then the values': the result has half as many columns.
    x: prepared rows are for `norm`. tickets: (TICKETS,) int32 zeros, and zero again afterwards:
    with them, parts of the inputs may be read by different programs.
    overlap: read the weight while the kernel before still runs; that one must not have written it.
    """
    x = x if isinstance(x, ThinRows) else ThinRows(x)
    return _thin_linear(x, weight, norm, activation, residual, None, tickets, overlap).rows


def thin_residual(
    x: Tensor,
    weight: ThinWeight,
    residual: Tensor,
    next_norm: InputNorm,
    *,
    tickets: Tensor | None = None,
    overlap: bool = False,
) -> ThinRows:
    """residual + weight · x + bias, and what `next_norm` will need of it."""
    return _thin_linear(ThinRows(x), weight, None, None, residual, next_norm, tickets, overlap)


def _thin_linear(
    x: ThinRows,
    weight: ThinWeight,
    norm: InputNorm | None,
    activation: Activation | None,
    residual: Tensor | None,
    next_norm: InputNorm | None,
    tickets: Tensor | None,
    overlap: bool,
) -> ThinRows:
    rows = x.rows
    if not (launch.runs_triton(rows) and rows.dtype == torch.bfloat16 and len(rows) <= MOST_ROWS):
        return ThinRows(
            thin_linear_torch(rows, weight, norm=norm, activation=activation, residual=residual)
        )
    gain, eps = (norm.gain, norm.eps) if norm else (None, 0.0)
    squares = x.squares if norm else None
    if squares is not None and x.scaled is not None:
        rows = x.scaled
    out, scaled, out_squares = _thin_linear_op(
        *(rows, weight.weight, weight.scale, weight.bias, gain, squares, eps, activation or ""),
        *(residual, next_norm.gain if next_norm else None, tickets, overlap),
    )
    return ThinRows(out, scaled, out_squares) if len(scaled) else ThinRows(out)


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


@torch.library.custom_op("pyper::thin_linear", mutates_args=("tickets",))
def _thin_linear_op(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    squares: Tensor | None,
    eps: float,
    activation: str,
    residual: Tensor | None,
    next_gain: Tensor | None,
    tickets: Tensor | None,
    overlap: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """All contiguous, x (B, D) bf16, with its gain in it where squares are given.

    Returns the product; of next_gain, the product times it and parts of the sum of its squares,
    (0, 0) without.
    """
    inner_norm = gain is not None and squares is None
    blocks = blocks_of(x, weight, activation, inner_norm or tickets is None)
    out, scaled, out_squares = _outputs(x, weight, activation, next_gain, blocks)
    (B, D), N = x.shape, out.shape[1]
    if B == 1 and takes(weight):
        linear_of_row(x, weight, scale, bias, gain, eps, activation, residual, out, overlap)
        return out, scaled, out_squares
    n_blocks, block_b = -(-N // blocks.outputs), row_block(B)
    part = None
    if blocks.splits > 1:
        rows = n_blocks * blocks.outputs * (2 if activation == "swiglu" else 1)
        part = x.new_empty(blocks.splits, rows, block_b, dtype=torch.float32)
    if not inner_norm and scale is None and stream_fits(x, weight, activation, blocks):
        given = (x, weight, bias, squares, residual, out, next_gain, scaled, out_squares)
        stream_rows(*given, part, tickets, eps, activation, blocks.splits, overlap)
        return out, scaled, out_squares
    thin_linear_block[(n_blocks, blocks.splits)](
        *(x, weight, scale, bias, gain, squares, residual, out),
        *(next_gain, scaled, out_squares, part, tickets, B, eps),
        N=N,
        D=D,
        ACTIVATION=activation,
        HAS_NORM=gain is not None,
        N_SQUARES=0 if squares is None else len(squares),
        HAS_SCALE=scale is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_NEXT=next_gain is not None,
        N_SPLITS=blocks.splits,
        BLOCK_B=block_b,
        BLOCK_N=blocks.outputs,
        BLOCK_D=blocks.inputs,
        LINES=lines_ahead(D // blocks.splits * weight.element_size()),
        num_stages=blocks.stages,
        num_warps=blocks.warps,
        **overlap_options(overlap, x.device),
    )
    return out, scaled, out_squares


@_thin_linear_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    squares: Tensor | None,
    eps: float,
    activation: str,
    residual: Tensor | None,
    next_gain: Tensor | None,
    tickets: Tensor | None,
    overlap: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    inner_norm = gain is not None and squares is None
    blocks = blocks_of(x, weight, activation, inner_norm or tickets is None)
    return _outputs(x, weight, activation, next_gain, blocks)


def _outputs(
    x: Tensor, weight: Tensor, activation: str, next_gain: Tensor | None, blocks: Blocks
) -> tuple[Tensor, Tensor, Tensor]:
    B, N = len(x), n_outputs_of(weight, activation)
    out = x.new_empty(B, N)
    if next_gain is None or (B == 1 and takes(weight)):
        return out, x.new_empty(0, 0), x.new_empty(0, 0, dtype=torch.float32)
    squares = x.new_empty(-(-N // blocks.outputs), B, dtype=torch.float32)
    return out, torch.empty_like(out), squares
