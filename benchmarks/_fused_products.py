"""A trial: the products around GELU with GELU in their epilogue, instead of in a pass of its own.

They stay out of the package unless they beat cuBLAS and a separate pass; `sparse_layer.py --stages`
prints both. Rows of an expert must fill whole tiles.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pyper.kernels.activation import _value_and_slope


@dataclass(frozen=True)
class Tile:
    rows: int
    cols: int
    warps: int
    stages: int
    depth: int = 64
    launch: bool = True
    """Compile only where it is off."""

    def __str__(self) -> str:
        return f"{self.rows}×{self.cols}, {self.warps} warps, {self.stages} stages"


TILES = (Tile(128, 128, 4, 3), Tile(128, 256, 8, 3), Tile(128, 256, 8, 4), Tile(256, 128, 8, 3))


def up_gelu(
    rows: Tensor, up: Tensor, gates: Tensor, token_index: Tensor, tile: Tile
) -> tuple[Tensor, Tensor]:
    """(pre, gate · gelu(pre)), (E, C, F), of rows (E, C, D) and up (E, F, D)."""
    (E, C, D), d_ff = rows.shape, up.shape[1]
    pre, hidden = (rows.new_empty(E, C, d_ff) for _ in range(2))
    out_block = (tile.rows, tile.cols)
    _run(_up_gelu, E * (C // tile.rows) * triton.cdiv(d_ff, tile.cols), tile)(
        _tiles(rows, tile.rows, tile.depth),
        _tiles(up, tile.cols, tile.depth),
        _tiles(pre, *out_block),
        _tiles(hidden, *out_block),
        *(gates, token_index, C),
        D=D,
        F=d_ff,
        E=E,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.cols,
        BLOCK_K=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return pre, hidden


def down_gradient_gelu(
    dy: Tensor, down: Tensor, pre: Tensor, gates: Tensor, token_index: Tensor, tile: Tile
) -> tuple[Tensor, Tensor]:
    """(dpre (E, C, F), gradient of each row's gate (E, C)) of dy (E, C, D) and down (E, D, F)."""
    (E, C, D), d_ff = dy.shape, down.shape[2]
    dpre = torch.empty_like(pre)
    parts = dy.new_empty(triton.cdiv(d_ff, tile.cols), E, C, dtype=torch.float32)
    out_block = (tile.rows, tile.cols // 4)
    _run(_down_gradient_gelu, E * (C // tile.rows) * len(parts), tile)(
        _tiles(dy, tile.rows, tile.depth),
        _tiles(down, tile.depth, tile.cols),
        _tiles(pre, *out_block),
        _tiles(dpre, *out_block),
        *(parts, gates, token_index, C),
        D=D,
        F=d_ff,
        E=E,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.cols,
        BLOCK_K=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return dpre, parts.sum(dim=0)


def _run(kernel: Any, programs: int, tile: Tile) -> Any:
    return kernel[(programs,)] if tile.launch else partial(kernel.warmup, grid=(1,))


def _tiles(x: Tensor, rows: int, cols: int) -> TensorDescriptor:
    flat = x.detach().flatten(0, 1)
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [rows, cols])


@triton.jit
def _place(C, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Expert, tile row and tile column; eight tile rows go together through the weight."""
    in_row = tl.cdiv(F, BLOCK_N)
    of_expert = (C // BLOCK_M) * in_row
    expert = tl.program_id(0) // of_expert
    place = tl.program_id(0) % of_expert
    group = place // (8 * in_row)
    height = tl.minimum(C // BLOCK_M - group * 8, 8)
    row = group * 8 + (place % (8 * in_row)) % height
    return expert, row, (place % (8 * in_row)) // height


@triton.jit
def _up_gelu(
    rows,
    up,
    pre,
    hidden,
    gates_ptr,
    index_ptr,
    C,
    D: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    e, m, n = _place(C, F, BLOCK_M, BLOCK_N)
    first = e * C + m * BLOCK_M
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, D, BLOCK_K):
        a = rows.load([first, k])
        b = up.load([e * F + n * BLOCK_N, k])
        total = tl.dot(a, b.T, total)
    token = tl.load(index_ptr + first + tl.arange(0, BLOCK_M))
    gate = tl.load(gates_ptr + token * E + e)
    rounded = total.to(pre.dtype)
    pre.store([first, n * BLOCK_N], rounded)
    value, _ = _value_and_slope(rounded.to(tl.float32), "gelu")
    hidden.store([first, n * BLOCK_N], (value * gate[:, None]).to(hidden.dtype))


@triton.jit
def _down_gradient_gelu(
    dy,
    down,
    pre,
    dpre,
    parts_ptr,
    gates_ptr,
    index_ptr,
    C,
    D: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    e, m, n = _place(C, F, BLOCK_M, BLOCK_N)
    first = e * C + m * BLOCK_M
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, D, BLOCK_K):
        a = dy.load([first, k])
        b = down.load([e * D + k, n * BLOCK_N])
        total = tl.dot(a, b, total)
    row = first + tl.arange(0, BLOCK_M)
    gate = tl.load(gates_ptr + tl.load(index_ptr + row) * E + e)
    # Quarter by quarter: all at once would not fit beside the sums in registers.
    left, right = _halves(total)
    q0, q1 = _halves(left)
    q2, q3 = _halves(right)
    column = n * BLOCK_N
    dot = _finish(q0, pre, dpre, gate, first, column)
    dot += _finish(q1, pre, dpre, gate, first, column + BLOCK_N // 4)
    dot += _finish(q2, pre, dpre, gate, first, column + BLOCK_N // 2)
    dot += _finish(q3, pre, dpre, gate, first, column + 3 * BLOCK_N // 4)
    tl.store(parts_ptr + n * (E * C) + row, dot)


@triton.jit
def _halves(x):
    """Left and right half of the columns."""
    x = tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2))
    return tl.split(tl.permute(x, (0, 2, 1)))


@triton.jit
def _finish(dhidden, pre, dpre, gate, row, column):
    value, slope = _value_and_slope(pre.load([row, column]).to(tl.float32), "gelu")
    dpre.store([row, column], (dhidden * slope * gate[:, None]).to(dpre.dtype))
    return tl.sum(dhidden * value, axis=1)
