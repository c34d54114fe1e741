"""The products of `_fused_products`, where GELU runs behind the next tile's products (Hopper).

Each multiprocessor keeps one program, which goes from tile to tile. One warp fetches; two groups of
four warps multiply 64 × 256 numbers each. A finished tile is packed into half of the registers, and
its activation is done slice by slice between the products of the next tile, while the tensor cores
are busy: neither the activation nor its stores hold them up.

Triton's lower language (Gluon) says which warps do what. Its interpreter does not exist.
"""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pyper.kernels.activation import _normal_tail

ROWS, COLS, DEPTH = gl.constexpr(128), gl.constexpr(256), gl.constexpr(64)
HALF = gl.constexpr(64)
_TILE_LAYOUT = gl.NVMMASharedLayout(128, 16, 2)


@dataclass(frozen=True)
class Plan:
    slices: int
    """Parts of a tile whose activation is done at once."""
    stages: int = 4
    group: int = 8
    """Tile rows that go together through the weight."""
    rolled: bool = False
    """Slices in a loop: an eighth of the instructions to fetch, and moves from slice to slice."""
    mode: str = "exact"
    """`tanh` is that of the special unit, 11 bits; `none` leaves GELU out, to see what it costs."""
    launch: bool = True

    @property
    def constants(self) -> dict[str, Any]:
        """What the kernels are compiled for."""
        chosen = {"STAGES": self.stages, "GROUP": self.group, "SLICES": self.slices}
        return chosen | {"ROLLED": self.rolled, "MODE": self.mode}

    def __str__(self) -> str:
        rolled = " in a loop" if self.rolled else ""
        return f"overlapped, {self.slices} slices{rolled}, groups of {self.group}, {self.mode}"


PLANS = (
    Plan(8),
    Plan(8, rolled=True),
    Plan(8, rolled=True, group=16),
    Plan(8, rolled=True, mode="tanh"),
    Plan(8, rolled=True, mode="none"),
    Plan(4),
)


def up_gelu(
    rows: Tensor, up: Tensor, gates: Tensor, token_index: Tensor, plan: Plan
) -> tuple[Tensor, Tensor]:
    """(pre, gate · gelu(pre)), (E, C, F), of rows (E, C, D) and up (E, F, D)."""
    pre, hidden = (rows.new_empty(*rows.shape[:2], up.shape[1]) for _ in range(2))
    tiles = [_tiles(rows, 64, 64), _tiles(up, 256, 64)]
    tiles += [_words(x, 128 // plan.slices) for x in (pre, hidden)]
    _launch(tiles, (gates, gates, token_index), up.shape[1], plan, backward=False)
    return pre, hidden


def down_gradient_gelu(
    dy: Tensor, down: Tensor, pre: Tensor, gates: Tensor, token_index: Tensor, plan: Plan
) -> tuple[Tensor, Tensor]:
    """(dpre (E, C, F), gradient of each row's gate (E, C)) of dy (E, C, D) and down (E, D, F)."""
    (E, C, _), d_ff = dy.shape, down.shape[2]
    dpre = torch.empty_like(pre)
    parts = dy.new_empty(d_ff // 256, E, C, dtype=torch.float32)
    tiles = [_tiles(dy, 64, 64), _tiles(down, 64, 256)]
    tiles += [_words(x, 128 // plan.slices) for x in (pre, dpre)]
    _launch(tiles, (parts, gates, token_index), d_ff, plan, backward=True)
    return dpre, parts.sum(dim=0)


def _launch(
    tiles: list[TensorDescriptor],
    tensors: tuple[Tensor, ...],
    d_ff: int,
    plan: Plan,
    *,
    backward: bool,
) -> None:
    """One program for each multiprocessor; compiled only where `plan.launch` is off."""
    E, C, D = tiles[0].base.shape
    run = _product[(min(_processors(), E * (C // 128) * (d_ff // 256)),)]
    if not plan.launch:
        run = partial(_product.warmup, grid=(1,))
    constants = plan.constants | {"BACKWARD": backward}
    run(*tiles, *tensors, C, E=E, D=D, F=d_ff, **constants, num_warps=4)


@cache
def _processors() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count


def _tiles(x: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """Of (E, rows, cols) bf16."""
    shape = [x.shape[0] * x.shape[1], x.shape[2]]
    return TensorDescriptor(x, shape, [x.shape[2], 1], [rows, cols], _TILE_LAYOUT)


def _words(x: Tensor, width: int) -> TensorDescriptor:
    """The same, two numbers a word."""
    x = x.view(torch.int32)
    shape = [x.shape[0] * x.shape[1], x.shape[2]]
    return TensorDescriptor(x, shape, [x.shape[2], 1], [64, width], _shared(width))


@gluon.constexpr_function
def _in_slice(width):
    """Which thread holds which words of (64, width): as the products leave them."""
    columns = [[0, 4 << i] for i in range((width // 4).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[8, 0], *columns],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, width],
    )


@gluon.constexpr_function
def _shared(width):
    """64 rows of words, as the copy engine wants them."""
    return gl.NVMMASharedLayout(min(4 * width, 128), 32, 2)


@gluon.jit
def _n_tiles(C, E: gl.constexpr, F: gl.constexpr):
    return E * (C // ROWS) * (F // COLS)


@gluon.jit
def _place(tile, C, F: gl.constexpr, GROUP: gl.constexpr):
    """Expert, first row and first column of a tile."""
    in_row: gl.constexpr = F // COLS
    of_expert = (C // ROWS) * in_row
    expert = tile // of_expert
    place = tile % of_expert
    group = place // (GROUP * in_row)
    height = gl.minimum(C // ROWS - group * GROUP, GROUP)
    row = group * GROUP + (place % (GROUP * in_row)) % height
    column = (place % (GROUP * in_row)) // height
    return expert, expert * C + row * ROWS, column * COLS


@gluon.jit
def _fetch(
    a_tiles,
    b_tiles,
    ring,
    C,
    E: gl.constexpr,
    D: gl.constexpr,
    F: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    BACKWARD: gl.constexpr,
):
    """What all tiles of this program need, as far ahead as the ring allows."""
    a, b, ready, free = ring
    step = 0
    for tile in range(gl.program_id(0), _n_tiles(C, E, F), gl.num_programs(0)):
        expert, row, column = _place(tile, C, F, GROUP)
        for k in range(0, D, DEPTH):
            stage = step % STAGES
            mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)
            bar = ready.index(stage)
            mbarrier.expect(bar, (ROWS + COLS) * DEPTH * 2)
            tma.async_copy_global_to_shared(a_tiles, [row, k], bar, a.index(2 * stage))
            tma.async_copy_global_to_shared(a_tiles, [row + HALF, k], bar, a.index(2 * stage + 1))
            if BACKWARD:
                at = [expert * D + k, column]
            else:
                at = [expert * F + column, k]
            tma.async_copy_global_to_shared(b_tiles, at, bar, b.index(stage))
            step += 1


@gluon.jit
def _multiply(
    acc,
    step,
    first,
    ring,
    N: gl.constexpr,
    WHICH: gl.constexpr,
    STAGES: gl.constexpr,
    BACKWARD: gl.constexpr,
):
    """N steps in depth. The last one is still running on return."""
    a, b, ready, free = ring
    for _ in range(N):
        stage = step % STAGES
        mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
        weight = b.index(stage)
        if not BACKWARD:
            weight = weight.permute((1, 0))
        rows = a.index(2 * stage + WHICH)
        acc = warpgroup_mma(rows, weight, acc, use_acc=step > first, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), pred=step > first)
        step += 1
    return acc, step


@gluon.jit
def _pair(low, high):
    """Two numbers as bf16 in one word."""
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], gl.int32, True, 1
    )


@gluon.jit
def _unpair(pair):
    low = (pair << 16).to(gl.float32, bitcast=True)
    high = (pair & -65536).to(gl.float32, bitcast=True)
    return low, high


@gluon.jit
def _slices(x, N: gl.constexpr):
    """N equal parts of the columns, from left to right."""
    if N == 1:
        parts = (gl.convert_layout(x, _in_slice(x.shape[1]), assert_trivial=True),)
    else:
        halves = gl.reshape(x, (x.shape[0], 2, x.shape[1] // 2))
        left, right = gl.split(gl.permute(halves, (0, 2, 1)))
        parts = _slices(left, N // 2) + _slices(right, N // 2)
    return parts


@gluon.jit
def _packed(acc, SLICES: gl.constexpr):
    """The sums as bf16, two in a word, in slices."""
    low, high = gl.split(gl.reshape(acc, (acc.shape[0], acc.shape[1] // 2, 2)))
    return _slices(_pair(low, high), SLICES)


@gluon.jit
def _value_and_slope(x, MODE: gl.constexpr):
    """GELU and its derivative."""
    if MODE == "tanh":
        # Φ(x) = (1 + tanh u) / 2, where u / x is a polynomial of x², fitted to 3e-5 for |x| < 4.5.
        square = gl.minimum(x * x, 32.0)
        u = x * ((square * -0.0003516 + 0.03700606) * square + 0.79750751)
        phi = 0.5 + 0.5 * gl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=r,r", [u], gl.float32, True, 1
        )
        value = x * phi
        slope = phi + x * 0.3989422804014327 * gl.exp2(x * x * -0.7213475204444817)
    elif MODE == "none":
        value = x
        slope = x
    else:
        tail, bell = _normal_tail(x)
        value = gl.maximum(x, 0.0) - gl.abs(x) * tail
        slope = gl.where(x > 0, 1.0 - tail, tail) + x * bell * 0.3989422804014327
    return value, slope


@gluon.jit
def _activate(x, gate, place, tiles, buffers, MODE: gl.constexpr):
    """Writes a slice of pre and of the hidden rows."""
    low, high = _unpair(x)
    low, _ = _value_and_slope(low, MODE)
    high, _ = _value_and_slope(high, MODE)
    y = _pair(low * gate[:, None], high * gate[:, None])
    tma.store_wait(0)
    buffers[0].store(x)
    buffers[1].store(y)
    fence_async_shared()
    tma.async_copy_shared_to_global(tiles[0], place, buffers[0])
    tma.async_copy_shared_to_global(tiles[1], place, buffers[1])


@gluon.jit
def _differentiate(
    dhidden, gate, dot, s, place, next_place, more, tiles, buffers, came, MODE: gl.constexpr
):
    """Writes a slice of dpre and sends for the next one of pre. Returns the sums for the gates."""
    mbarrier.wait(came, s & 1)
    x = buffers[0].load(dhidden.type.layout)
    _send_for(tiles[0], next_place, came, buffers[0], more)
    low, high = _unpair(x)
    dlow, dhigh = _unpair(dhidden)
    low, low_slope = _value_and_slope(low, MODE)
    high, high_slope = _value_and_slope(high, MODE)
    dot += gl.sum(dlow * low + dhigh * high, axis=1)
    y = _pair(dlow * low_slope * gate[:, None], dhigh * high_slope * gate[:, None])
    tma.store_wait(0)
    buffers[1].store(y)
    fence_async_shared()
    tma.async_copy_shared_to_global(tiles[1], place, buffers[1])
    return dot


@gluon.jit
def _send_for(tiles, place, came, buffer, wanted):
    mbarrier.expect(came, buffer.shape[0] * buffer.shape[1] * 4, pred=wanted)
    tma.async_copy_global_to_shared(tiles, place, came, buffer, pred=wanted)


@gluon.jit
def _finish(
    x,
    gate,
    dot,
    s,
    at,
    next_at,
    more,
    tiles,
    buffers,
    came,
    SLICES: gl.constexpr,
    MODE: gl.constexpr,
    BACKWARD: gl.constexpr,
):
    """Slice s of the finished tile at `at`, (row, column in words); `more` tiles follow."""
    WORDS: gl.constexpr = COLS // 2 // SLICES
    row, word = at
    place = [row, word + s * WORDS]
    if BACKWARD:
        last = s == SLICES - 1
        next_row, next_word = next_at
        next_place = [gl.where(last, next_row, row), gl.where(last, next_word, place[1] + WORDS)]
        wanted = more | (s < SLICES - 1)
        dot = _differentiate(x, gate, dot, s, place, next_place, wanted, tiles, buffers, came, MODE)
    else:
        _activate(x, gate, place, tiles, buffers, MODE)
    return dot


@gluon.jit
def _round(
    acc,
    step,
    first,
    ring,
    x,
    gate,
    dot,
    s,
    at,
    next_at,
    tiles,
    buffers,
    came,
    D: gl.constexpr,
    WHICH: gl.constexpr,
    STAGES: gl.constexpr,
    SLICES: gl.constexpr,
    MODE: gl.constexpr,
    BACKWARD: gl.constexpr,
):
    """A share of this tile's products, and slice s of the last tile while some of them run."""
    STEPS: gl.constexpr = D // DEPTH // SLICES
    EARLY: gl.constexpr = 1 + WHICH * (STEPS // 2)
    acc, step = _multiply(acc, step, first, ring, EARLY, WHICH, STAGES, BACKWARD)
    if first > 0:
        dot = _finish(
            x, gate, dot, s, at, next_at, True, tiles, buffers, came, SLICES, MODE, BACKWARD
        )
    acc, step = _multiply(acc, step, first, ring, STEPS - EARLY, WHICH, STAGES, BACKWARD)
    return acc, step, dot


@gluon.jit
def _work(
    tiles,
    buffers,
    came,
    parts_ptr,
    gates_ptr,
    index_ptr,
    ring,
    C,
    WHICH: gl.constexpr,
    E: gl.constexpr,
    D: gl.constexpr,
    F: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    SLICES: gl.constexpr,
    ROLLED: gl.constexpr,
    MODE: gl.constexpr,
    BACKWARD: gl.constexpr,
):
    """One of two groups of warps: its 64 rows of each tile."""
    ROW: gl.constexpr = gl.SliceLayout(1, _in_slice(COLS // 2 // SLICES))
    free = ring[3]
    rows = gl.arange(0, HALF, ROW)
    acc = gl.zeros(
        (HALF, COLS), gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    )
    parts = _packed(acc, SLICES)
    gate = gl.zeros((HALF,), gl.float32, ROW)
    dot = gl.zeros((HALF,), gl.float32, ROW)
    step = 0
    row = 0
    word = 0
    for tile in range(gl.program_id(0), _n_tiles(C, E, F), gl.num_programs(0)):
        expert, next_row, next_column = _place(tile, C, F, GROUP)
        next_row += WHICH * HALF
        next_word = next_column // 2
        token = gl.load(index_ptr + next_row + rows).to(gl.int32)
        first = step
        if BACKWARD:
            _send_for(tiles[0], [next_row, next_word], came, buffers[0], first == 0)
        if ROLLED:
            for s in range(SLICES):
                acc, step, dot = _round(
                    acc,
                    step,
                    first,
                    ring,
                    parts[0],
                    gate,
                    dot,
                    s,
                    (row, word),
                    (next_row, next_word),
                    tiles,
                    buffers,
                    came,
                    D,
                    WHICH,
                    STAGES,
                    SLICES,
                    MODE,
                    BACKWARD,
                )
                parts = parts[1:] + parts[:1]
        else:
            for s in gl.static_range(SLICES):
                acc, step, dot = _round(
                    acc,
                    step,
                    first,
                    ring,
                    parts[s],
                    gate,
                    dot,
                    s,
                    (row, word),
                    (next_row, next_word),
                    tiles,
                    buffers,
                    came,
                    D,
                    WHICH,
                    STAGES,
                    SLICES,
                    MODE,
                    BACKWARD,
                )
        if BACKWARD:
            if first > 0:
                gl.store(parts_ptr + word // (COLS // 2) * (E * C) + row + rows, dot)
            dot = gl.zeros((HALF,), gl.float32, ROW)
        gate = gl.load(gates_ptr + token * E + expert)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES))
        parts = _packed(acc, SLICES)
        row = next_row
        word = next_word
    if step > 0:
        for s in gl.static_range(SLICES):
            dot = _finish(
                parts[s],
                gate,
                dot,
                s,
                (row, word),
                (0, 0),
                False,
                tiles,
                buffers,
                came,
                SLICES,
                MODE,
                BACKWARD,
            )
        if BACKWARD:
            gl.store(parts_ptr + word // (COLS // 2) * (E * C) + row + rows, dot)
    tma.store_wait(0)


@gluon.jit
def _product(
    a_tiles,
    b_tiles,
    pre_tiles,
    out_tiles,
    parts_ptr,
    gates_ptr,
    index_ptr,
    C,
    E: gl.constexpr,
    D: gl.constexpr,
    F: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    SLICES: gl.constexpr,
    ROLLED: gl.constexpr,
    MODE: gl.constexpr,
    BACKWARD: gl.constexpr,
):
    """Forward: pre and the hidden rows (out). Backward: dpre (out) of pre, and sums for gates."""
    WORDS: gl.constexpr = COLS // 2 // SLICES
    a = gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES, HALF, DEPTH], a_tiles.layout)
    if BACKWARD:
        b = gl.allocate_shared_memory(gl.bfloat16, [STAGES, DEPTH, COLS], b_tiles.layout)
    else:
        b = gl.allocate_shared_memory(gl.bfloat16, [STAGES, COLS, DEPTH], b_tiles.layout)
    buffers = gl.allocate_shared_memory(gl.int32, [4, HALF, WORDS], _shared(WORDS))
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    came = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(came.index(i), count=1)
    fence_async_shared()
    tiles = (pre_tiles, out_tiles)
    ring = (a, b, ready, free)
    buffers_0 = (buffers.index(0), buffers.index(1))
    buffers_1 = (buffers.index(2), buffers.index(3))
    gl.warp_specialize(
        [
            (
                _work,
                (
                    tiles,
                    buffers_0,
                    came.index(0),
                    parts_ptr,
                    gates_ptr,
                    index_ptr,
                    ring,
                    C,
                    0,
                    E,
                    D,
                    F,
                    STAGES,
                    GROUP,
                    SLICES,
                    ROLLED,
                    MODE,
                    BACKWARD,
                ),
            ),
            (
                _work,
                (
                    tiles,
                    buffers_1,
                    came.index(1),
                    parts_ptr,
                    gates_ptr,
                    index_ptr,
                    ring,
                    C,
                    1,
                    E,
                    D,
                    F,
                    STAGES,
                    GROUP,
                    SLICES,
                    ROLLED,
                    MODE,
                    BACKWARD,
                ),
            ),
            (_fetch, (a_tiles, b_tiles, ring, C, E, D, F, STAGES, GROUP, BACKWARD)),
        ],
        [4, 1],
        [240, 24],
    )
