"""`thin_linear` of several bf16 rows on Hopper: weights come before the kernel before has ended.

Triton fills a product's ring of tiles where the loop begins, and the loop needs rows that the
kernel before is still writing. In its lower language (Gluon) the two are sent for apart: weights at
once, as many as the shared memory holds, rows when they are there.
"""

import torch
from torch import Tensor

from pyper.kernels.gluon_support import is_tried
from pyper.kernels.launch import block_of
from pyper.kernels.overlap import launch_options
from pyper.kernels.thin_blocks import SHARED_BYTES, Blocks, row_block

OUTPUTS, INPUTS = 64, 128
"""Of a tile of weights."""
_MOST_STAGES = 10


def stream_fits(x: Tensor, weight: Tensor, activation: str, blocks: Blocks) -> bool:
    """Whether the kernel takes rows x (B, D) and weight (N, D) in these blocks."""
    if not x.is_cuda or weight.dtype != torch.bfloat16 or activation == "swiglu":
        return False
    n_tiles, rest = divmod(weight.shape[1], blocks.splits * INPUTS)
    # Triton does not build a loop of one tile.
    fits = blocks.outputs == OUTPUTS and rest == 0 and n_tiles > 1
    return fits and is_tried(x.device.index)


def stream_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    squares: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    next_gain: Tensor | None,
    scaled: Tensor,
    out_squares: Tensor,
    part: Tensor | None,
    tickets: Tensor | None,
    eps: float,
    activation: str,
    splits: int,
    overlap: bool,
) -> None:
    """Writes out (B, N); with next_gain also scaled and out_squares, what that norm needs of it.

    squares: of the rows, where their norm is asked for. part: (splits, rows, B) float32, room for
    the parts of more than one split. The others as in `thin_linear`.
    """
    from pyper.kernels.thin_stream_kernel import stream

    block_b, n_squares = row_block(len(x)), 0 if squares is None else len(squares)
    following = (None, None, None) if next_gain is None else (next_gain, scaled, out_squares)
    stream[(-(-out.shape[1] // OUTPUTS), splits)](
        *(x, weight, bias, squares, residual, out, *following),
        *(part, tickets if splits > 1 else None, len(x), eps),
        N=out.shape[1],
        D=x.shape[1],
        ACTIVATION=activation,
        N_SQUARES=n_squares,
        BLOCK_SQUARES=block_of(max(n_squares, 1), 1 << 20),
        N_SPLITS=splits,
        OUTPUTS=OUTPUTS,
        INPUTS=INPUTS,
        BLOCK_B=block_b,
        STAGES=stages_of(block_b),
        num_warps=4,
        **launch_options(overlap, x.device),
    )


def stages_of(block_b: int) -> int:
    """Tiles of weights and rows that the shared memory holds, or as many as help."""
    return min(SHARED_BYTES // (2 * INPUTS * (OUTPUTS + block_b)), _MOST_STAGES)
