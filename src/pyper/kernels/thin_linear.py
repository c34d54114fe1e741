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
from typing import NamedTuple

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
    from pyper.kernels.thin_linear_kernel import thin_linear_block

MOST_ROWS = 64
"""With more, the product is bound by arithmetic, and a library's is faster."""
TICKETS = 256
"""As many blocks of outputs may be put together of parts."""
MOST_LINES = 8
"""Of 128 bytes, of each weight row, are asked for before there is a use for them."""
SHARED_BYTES = 227 * 1024
"""A program of a large GPU may have."""
_PROGRAMS = 96
"""Each of a large GPU's processors should have one, or nearly."""
_LEAST_PART = 512
"""Inputs; less are read faster than parts of them are joined."""


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
    blocks = _blocks_of(x, weight, activation, inner_norm or tickets is None)
    out, scaled, out_squares = _outputs(x, weight, activation, next_gain, blocks)
    (B, D), N = x.shape, out.shape[1]
    if B == 1 and takes(weight):
        linear_of_row(x, weight, scale, bias, gain, eps, activation, residual, out, overlap)
        return out, scaled, out_squares
    n_blocks, block_b = -(-N // blocks.outputs), max(block_of(B, MOST_ROWS), 16)
    part = None
    if blocks.splits > 1:
        rows = n_blocks * blocks.outputs * (2 if activation == "swiglu" else 1)
        part = x.new_empty(blocks.splits, rows, block_b, dtype=torch.float32)
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
        LINES=_ahead(D // blocks.splits * weight.element_size()),
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
    blocks = _blocks_of(x, weight, activation, inner_norm or tickets is None)
    return _outputs(x, weight, activation, next_gain, blocks)


class Blocks(NamedTuple):
    """What a program takes."""

    outputs: int
    inputs: int
    """At a time."""
    splits: int
    """Programs that share the inputs of a block of outputs."""
    stages: int
    warps: int


def _blocks_of(x: Tensor, weight: Tensor, activation: str, alone: bool) -> Blocks:
    """alone: every program must see all inputs."""
    D, N = x.shape[1], _width_of(weight, activation)
    blocks = _blocks(weight, len(x), activation, alone)
    width = min(blocks.inputs, max(block_of(D, 1 << 20), 16))
    # An input's part is a block at least.
    splits = min(blocks.splits, -(-D // width)) if -(-N // blocks.outputs) <= TICKETS else 1
    return blocks._replace(inputs=width, splits=1 if alone else splits)


def _blocks(weight: Tensor, n_rows: int, activation: str, alone: bool) -> Blocks:
    """As `_wanted`, with no more stages than there is memory for."""
    blocks = _wanted(weight, n_rows, _width_of(weight, activation), alone)
    n_bytes = blocks.outputs * (2 if activation == "swiglu" else 1) * weight.element_size()
    of_stage = blocks.inputs * (n_bytes + max(block_of(n_rows, MOST_ROWS), 16) * 2)
    return blocks._replace(stages=min(blocks.stages, SHARED_BYTES // of_stage))


def _wanted(weight: Tensor, n_rows: int, n_outputs: int, alone: bool) -> Blocks:
    """Each of a large GPU's processors should have a program, and much on its way.

    Eight bits are widened before they are used: of few rows, two programs take turns.
    """
    few, narrow = n_rows <= 16, weight.element_size() == 1
    if alone and n_outputs <= 4096:
        return Blocks(16, 256, 1, 4, 4)
    if alone:
        return Blocks(64, 256, 1, 4 if few else 3, 4)
    if n_outputs >= 16384 and not few:  # half as many programs read the rows
        return Blocks(128, 64, 1, 4, 4)
    programs = 2 * _PROGRAMS if few and narrow else _PROGRAMS
    splits = block_of(-(-programs // -(-n_outputs // 64)), 8)
    splits = min(splits, 1 << max(weight.shape[1] // _LEAST_PART, 1).bit_length() >> 1)
    stages = 5 if few or not narrow else 4 if n_rows <= 32 else 3
    return Blocks(64, 128, splits, stages, 4)


def _outputs(
    x: Tensor, weight: Tensor, activation: str, next_gain: Tensor | None, blocks: Blocks
) -> tuple[Tensor, Tensor, Tensor]:
    B, N = len(x), _width_of(weight, activation)
    out = x.new_empty(B, N)
    if next_gain is None or (B == 1 and takes(weight)):
        return out, x.new_empty(0, 0), x.new_empty(0, 0, dtype=torch.float32)
    squares = x.new_empty(-(-N // blocks.outputs), B, dtype=torch.float32)
    return out, torch.empty_like(out), squares


def _width_of(weight: Tensor, activation: str) -> int:
    return len(weight) // 2 if activation == "swiglu" else len(weight)


def _ahead(row_bytes: int) -> int:
    """Lines of 128 bytes of each weight row that are asked for before there is a use for them."""
    lines = max(row_bytes // 128, 1)
    return min(1 << (lines.bit_length() - 1), MOST_LINES)
