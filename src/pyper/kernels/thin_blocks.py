"""What a program of `thin_linear` takes: outputs, inputs, and how much of them is on its way."""

from typing import NamedTuple

from torch import Tensor

from pyper.kernels.launch import block_of

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


class Blocks(NamedTuple):
    """What a program takes."""

    outputs: int
    inputs: int
    """At a time."""
    splits: int
    """Programs that share the inputs of a block of outputs."""
    stages: int
    warps: int


def blocks_of(x: Tensor, weight: Tensor, activation: str, alone: bool) -> Blocks:
    """alone: every program must see all inputs."""
    D, N = x.shape[1], n_outputs_of(weight, activation)
    blocks = _blocks(weight, len(x), activation, alone)
    width = min(blocks.inputs, max(block_of(D, 1 << 20), 16))
    # An input's part is a block at least.
    splits = min(blocks.splits, -(-D // width)) if -(-N // blocks.outputs) <= TICKETS else 1
    return blocks._replace(inputs=width, splits=1 if alone else splits)


def _blocks(weight: Tensor, n_rows: int, activation: str, alone: bool) -> Blocks:
    """As `_wanted`, with no more stages than there is memory for."""
    blocks = _wanted(weight, n_rows, n_outputs_of(weight, activation), alone)
    n_bytes = blocks.outputs * (2 if activation == "swiglu" else 1) * weight.element_size()
    of_stage = blocks.inputs * (n_bytes + row_block(n_rows) * 2)
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


def row_block(n_rows: int) -> int:
    """Rows of a tile: no product of matrices has less than sixteen."""
    return max(block_of(n_rows, MOST_ROWS), 16)


def n_outputs_of(weight: Tensor, activation: str) -> int:
    return len(weight) // 2 if activation == "swiglu" else len(weight)


def lines_ahead(row_bytes: int) -> int:
    """Lines of 128 bytes of each weight row that are asked for before there is a use for them."""
    lines = max(row_bytes // 128, 1)
    return min(1 << (lines.bit_length() - 1), MOST_LINES)
