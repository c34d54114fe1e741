"""The products around GELU with GELU and its gates inside, where a kernel of this file is faster.

    up_gelu:             pre = rows · upᵀ,     hidden = gate · gelu(pre)
    down_gradient_gelu:  dhidden = dy · down,  dpre = gate · dhidden · gelu'(pre)

Elsewhere a product of cuBLAS and a pass over its result do the same: `fits` says which.
"""

from typing import Any

import torch
from torch import Tensor

from pyper.config.expert import Activation
from pyper.kernels import launch
from pyper.kernels.gluon_support import is_tried, processors
from pyper.kernels.launch import block_of

if launch.HAS_TRITON:
    import triton
    import triton.language as tl

ROWS, COLS, DEPTH = 128, 256, 512
"""What rows of an expert, d_ff and d_model are multiples of."""
WIDTH = 1024
"""Of d_model at least: products this long hide GELU behind them."""
TILES = 264
"""At least: two for each multiprocessor, or nothing hides the activation of the first."""


def fits(
    rows: Tensor, up: Tensor, down: Tensor, activation: Activation, up_bias: Tensor | None
) -> bool:
    """Whether the kernel takes rows (E, C, D), up (E, F, D) and down (E, D, F)."""
    if activation != "gelu" or up_bias is not None or not rows.is_cuda:
        return False
    if any(x.dtype != torch.bfloat16 or not x.is_contiguous() for x in (rows, up, down)):
        return False
    (E, C, D), d_ff = rows.shape, up.shape[1]
    whole = C % ROWS == 0 and d_ff % COLS == 0 and D % DEPTH == 0 and D >= WIDTH
    full = E * (C // ROWS) * (d_ff // COLS) >= TILES
    return whole and full and is_tried(rows.device.index)


@torch.library.custom_op("pyper::up_gelu", mutates_args=())
def up_gelu(
    rows: Tensor, up: Tensor, gates: Tensor | None, token_index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(pre, gates_ne · gelu(pre)), (E, C, F), of rows (E, C, D) and up (E, F, D).

    Token n = token_index (E, C) is c-th of expert e; gates (N, E) float32; or neither.
    """
    pre, hidden = _up_results(rows, up)
    a, b = _ready(rows), _ready(up)
    _launch((a, (64, 64)), (b, (256, 64)), (pre, hidden, None), None, gates, token_index, False)
    return pre, hidden


@up_gelu.register_fake
def _(
    rows: Tensor, up: Tensor, gates: Tensor | None, token_index: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _up_results(rows, up)


def _up_results(rows: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    E, C, _ = rows.shape
    return rows.new_empty(E, C, up.shape[1]), rows.new_empty(E, C, up.shape[1])


@torch.library.custom_op("pyper::down_gradient_gelu", mutates_args=())
def down_gradient_gelu(
    dy: Tensor,
    down: Tensor,
    pre: Tensor,
    gates: Tensor | None,
    token_index: Tensor | None,
    want_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of pre (E, C, F) and gates (N, E), and the hidden rows again if wanted.

    dy (E, C, D), down (E, D, F). What is not asked for comes back empty; tokens that nobody took
    have no gradient in their gates.
    """
    dpre, dgates, hidden = _gradients_of(pre, gates, want_hidden)
    (E, C, _), d_ff = dy.shape, down.shape[2]
    parts = None if gates is None else gates.new_empty(d_ff // COLS, E, C)
    a, b, again = _ready(dy), _ready(down), hidden if want_hidden else None
    words = (_ready(pre), dpre, again)
    _launch((a, (64, 64)), (b, (64, 256)), words, parts, gates, token_index, True)
    if parts is not None and token_index is not None:
        _add_up(parts, token_index, dgates)
    return dpre, dgates, hidden


@down_gradient_gelu.register_fake
def _(
    dy: Tensor,
    down: Tensor,
    pre: Tensor,
    gates: Tensor | None,
    token_index: Tensor | None,
    want_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients_of(pre, gates, want_hidden)


def _gradients_of(
    pre: Tensor, gates: Tensor | None, want_hidden: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dgates = pre.new_empty(0) if gates is None else torch.zeros_like(gates)
    hidden = pre.new_empty(pre.shape if want_hidden else 0)
    return pre.new_empty(pre.shape), dgates, hidden


def _ready(x: Tensor) -> Tensor:
    """As the copy engine needs it: dense, from an address of 16 bytes."""
    x = x.detach().contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _launch(
    a: tuple[Tensor, tuple[int, int]],
    b: tuple[Tensor, tuple[int, int]],
    words: tuple[Tensor, Tensor, Tensor | None],
    parts: Tensor | None,
    gates: Tensor | None,
    token_index: Tensor | None,
    backward: bool,
) -> None:
    """One program for each multiprocessor. Both factors come with the blocks they are read in."""
    from pyper.kernels.gelu_products_kernel import TILE_LAYOUT, product
    from pyper.kernels.gelu_slices_kernel import WORDS_LAYOUT

    (E, C, D), d_ff = a[0].shape, words[0].shape[2]
    tiles = [_tiles(x, block, TILE_LAYOUT) for x, block in (a, b)]
    pre, out, again = (
        None if x is None else _tiles(x.view(torch.int32), (64, 16), WORDS_LAYOUT) for x in words
    )
    programs = min(processors(a[0].device.index), E * (C // ROWS) * (d_ff // COLS))
    product[(programs,)](
        *(*tiles, pre, out, again, parts, gates, token_index, C),
        E=E,
        D=D,
        F=d_ff,
        BACK=backward,
        GATED=gates is not None,
        AGAIN=again is not None,
        num_warps=4,
    )


def _tiles(x: Tensor, block: tuple[int, int], layout: Any) -> Any:
    """Of (E, rows, columns)."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    columns = x.shape[2]
    return TensorDescriptor(x, [x.shape[0] * x.shape[1], columns], [columns, 1], [*block], layout)


def _add_up(parts: Tensor, token_index: Tensor, dgates: Tensor) -> None:
    """parts (P, E, C) into dgates (N, E)."""
    P, E, C = parts.shape
    block = 32
    _sum_parts[(triton.cdiv(E * C, block),)](
        *(parts, token_index, dgates, E * C, C),
        E=E,
        PARTS=P,
        BLOCK_P=block_of(P, 4096),
        BLOCK_R=block,
    )


if launch.HAS_TRITON:

    @triton.jit
    def _sum_parts(
        parts_ptr,
        index_ptr,
        dgates_ptr,
        n_rows,
        C,
        E: tl.constexpr,
        PARTS: tl.constexpr,
        BLOCK_P: tl.constexpr,
        BLOCK_R: tl.constexpr,
    ):
        """dgates_ne = Σ_p parts_pec, where token n is c-th of expert e."""
        r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        p = tl.arange(0, BLOCK_P)[:, None]
        inside = (p < PARTS) & (r < n_rows)[None, :]
        parts = tl.load(parts_ptr + p.to(tl.int64) * n_rows + r[None, :], mask=inside, other=0.0)
        token = tl.load(index_ptr + r, mask=r < n_rows, other=0)
        tl.store(dgates_ptr + token * E + r // C, tl.sum(parts, axis=0), mask=r < n_rows)
