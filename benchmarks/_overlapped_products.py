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
    mode: str = "exact"
    """`tanh` is that of the special unit, 11 bits; `none` leaves GELU out, to see what it costs."""
    launch: bool = True

    @property
    def constants(self) -> dict[str, Any]:
        """What the kernels are compiled for."""
        chosen = {"STAGES": self.stages, "GROUP": self.group, "SLICES": self.slices}
        return chosen | {"MODE": self.mode}

    def __str__(self) -> str:
        return f"overlapped, {self.slices} slices, groups of {self.group}, {self.mode}"


PLANS = (
    Plan(8),
    Plan(8, group=16),
    Plan(8, mode="tanh"),
    Plan(8, mode="none"),
    Plan(4),
    Plan(4, group=16),
    Plan(4, mode="tanh"),
)


def up_gelu(
    rows: Tensor, up: Tensor, gates: Tensor, token_index: Tensor, plan: Plan
) -> tuple[Tensor, Tensor]:
    """(pre, gate · gelu(pre)), (E, C, F), of rows (E, C, D) and up (E, F, D)."""
    pre, hidden = (rows.new_empty(*rows.shape[:2], up.shape[1]) for _ in range(2))
    tiles = [_tiles(rows, 64, 64), _tiles(up, 256, 64)]
    tiles += [_words(x, 128 // plan.slices) for x in (pre, hidden)]
    _launch(_up_gelu, tiles, (gates, token_index), up.shape[1], plan)
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
    _launch(_down_gradient_gelu, tiles, (parts, gates, token_index), d_ff, plan)
    return dpre, parts.sum(dim=0)


def _launch(
    kernel: Any, tiles: list[TensorDescriptor], tensors: tuple[Tensor, ...], d_ff: int, plan: Plan
) -> None:
    """One program for each multiprocessor; compiled only where `plan.launch` is off."""
    E, C, D = tiles[0].base.shape
    run = kernel[(min(_processors(), E * (C // 128) * (d_ff // 256)),)]
    if not plan.launch:
        run = partial(kernel.warmup, grid=(1,))
    run(*tiles, *tensors, C, E=E, D=D, F=d_ff, **plan.constants, num_warps=4)


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
    a,
    b,
    ready,
    free,
    C,
    E: gl.constexpr,
    D: gl.constexpr,
    F: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    TRANSPOSED: gl.constexpr,
):
    step = 0
    n_tiles = E * (C // ROWS) * (F // COLS)
    for tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        expert, row, column = _place(tile, C, F, GROUP)
        for k in range(0, D, DEPTH):
            stage = step % STAGES
            mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)
            bar = ready.index(stage)
            mbarrier.expect(bar, (ROWS + COLS) * DEPTH * 2)
            tma.async_copy_global_to_shared(a_tiles, [row, k], bar, a.index(2 * stage))
            tma.async_copy_global_to_shared(a_tiles, [row + HALF, k], bar, a.index(2 * stage + 1))
            if TRANSPOSED:
                at = [expert * F + column, k]
            else:
                at = [expert * D + k, column]
            tma.async_copy_global_to_shared(b_tiles, at, bar, b.index(stage))
            step += 1


@gluon.jit
def _multiply(
    acc,
    step,
    first,
    a,
    b,
    ready,
    free,
    N: gl.constexpr,
    WHICH: gl.constexpr,
    STAGES: gl.constexpr,
    TRANSPOSED: gl.constexpr,
):
    """N steps in depth. The last one is still running on return."""
    for _ in range(N):
        stage = step % STAGES
        mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
        weight = b.index(stage)
        if TRANSPOSED:
            weight = weight.permute((1, 0))
        acc = warpgroup_mma(
            a.index(2 * stage + WHICH), weight, acc, use_acc=step > first, is_async=True
        )
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
def _halves(x):
    """Left and right half of the columns."""
    x = gl.reshape(x, (x.shape[0], 2, x.shape[1] // 2))
    return gl.split(gl.permute(x, (0, 2, 1)))


@gluon.jit
def _slice_of(x, s: gl.constexpr, SLICES: gl.constexpr):
    """The s-th of SLICES equal parts of the columns."""
    if SLICES == 1:
        part = x
    else:
        left, right = _halves(x)
        if s < SLICES // 2:
            part = _slice_of(left, s, SLICES // 2)
        else:
            part = _slice_of(right, s - SLICES // 2, SLICES // 2)
    return part


@gluon.jit
def _packed(acc):
    low, high = gl.split(gl.reshape(acc, (acc.shape[0], acc.shape[1] // 2, 2)))
    return _pair(low, high)


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
def _gated(x, gate, MODE: gl.constexpr):
    value, _ = _value_and_slope(x, MODE)
    return value * gate[:, None]


@gluon.jit
def _activate(
    packed,
    gate,
    row,
    column,
    pre_tiles,
    hidden_tiles,
    pre,
    hidden,
    s: gl.constexpr,
    SLICES: gl.constexpr,
    MODE: gl.constexpr,
):
    WORDS: gl.constexpr = COLS // SLICES // 2
    LAYOUT: gl.constexpr = _in_slice(WORDS)
    x = gl.convert_layout(_slice_of(packed, s, SLICES), LAYOUT, assert_trivial=True)
    low, high = _unpair(x)
    y = _pair(_gated(low, gate, MODE), _gated(high, gate, MODE))
    tma.store_wait(0)
    pre.store(x)
    hidden.store(y)
    fence_async_shared()
    at = [row, column // 2 + s * WORDS]
    tma.async_copy_shared_to_global(pre_tiles, at, pre)
    tma.async_copy_shared_to_global(hidden_tiles, at, hidden)


@gluon.jit
def _up_and_activate(
    pre_tiles,
    hidden_tiles,
    gates_ptr,
    index_ptr,
    a,
    b,
    ready,
    free,
    pre,
    hidden,
    C,
    WHICH: gl.constexpr,
    E: gl.constexpr,
    D: gl.constexpr,
    F: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    SLICES: gl.constexpr,
    MODE: gl.constexpr,
):
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, _in_slice(COLS // SLICES // 2))
    STEPS: gl.constexpr = D // DEPTH // SLICES
    EARLY: gl.constexpr = 1 + WHICH * (STEPS // 2)
    step = 0
    acc = gl.zeros((HALF, COLS), gl.float32, SUMS)
    packed = _packed(acc)
    gate = gl.zeros((HALF,), gl.float32, ROW)
    row = 0
    column = 0
    rows = gl.arange(0, HALF, ROW)
    n_tiles = E * (C // ROWS) * (F // COLS)
    for tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        expert, next_row, next_column = _place(tile, C, F, GROUP)
        next_row += WHICH * HALF
        token = gl.load(index_ptr + next_row + rows)
        first = step
        for s in gl.static_range(SLICES):
            acc, step = _multiply(acc, step, first, a, b, ready, free, EARLY, WHICH, STAGES, True)
            if first > 0:
                _activate(
                    packed, gate, row, column, pre_tiles, hidden_tiles, pre, hidden, s, SLICES, MODE
                )
            acc, step = _multiply(
                acc, step, first, a, b, ready, free, STEPS - EARLY, WHICH, STAGES, True
            )
        gate = gl.load(gates_ptr + token * E + expert)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES))
        packed = _packed(acc)
        row = next_row
        column = next_column
    if step > 0:
        for s in gl.static_range(SLICES):
            _activate(
                packed, gate, row, column, pre_tiles, hidden_tiles, pre, hidden, s, SLICES, MODE
            )
    tma.store_wait(0)


@gluon.jit
def _up_gelu(
    a_tiles,
    b_tiles,
    pre_tiles,
    hidden_tiles,
    gates_ptr,
    index_ptr,
    C,
    E: gl.constexpr,
    D: gl.constexpr,
    F: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    SLICES: gl.constexpr,
    MODE: gl.constexpr,
):
    WORDS: gl.constexpr = COLS // SLICES // 2
    a = gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES, HALF, DEPTH], a_tiles.layout)
    b = gl.allocate_shared_memory(gl.bfloat16, [STAGES, COLS, DEPTH], b_tiles.layout)
    out = gl.allocate_shared_memory(gl.int32, [4, HALF, WORDS], _shared(WORDS))
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _up_and_activate,
                (
                    pre_tiles,
                    hidden_tiles,
                    gates_ptr,
                    index_ptr,
                    a,
                    b,
                    ready,
                    free,
                    out.index(0),
                    out.index(1),
                    C,
                    0,
                    E,
                    D,
                    F,
                    STAGES,
                    GROUP,
                    SLICES,
                    MODE,
                ),
            ),
            (
                _up_and_activate,
                (
                    pre_tiles,
                    hidden_tiles,
                    gates_ptr,
                    index_ptr,
                    a,
                    b,
                    ready,
                    free,
                    out.index(2),
                    out.index(3),
                    C,
                    1,
                    E,
                    D,
                    F,
                    STAGES,
                    GROUP,
                    SLICES,
                    MODE,
                ),
            ),
            (_fetch, (a_tiles, b_tiles, a, b, ready, free, C, E, D, F, STAGES, GROUP, True)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _load_pre(pre_tiles, pre, came, row, column, s: gl.constexpr, SLICES: gl.constexpr):
    WORDS: gl.constexpr = COLS // SLICES // 2
    mbarrier.expect(came, HALF * WORDS * 4)
    tma.async_copy_global_to_shared(pre_tiles, [row, column // 2 + s * WORDS], came, pre)


@gluon.jit
def _differentiate(
    packed,
    gate,
    dot,
    row,
    column,
    next_row,
    next_column,
    pre_tiles,
    dpre_tiles,
    pre,
    dpre,
    came,
    s: gl.constexpr,
    SLICES: gl.constexpr,
    LAST: gl.constexpr,
    MODE: gl.constexpr,
):
    """Writes a slice of dpre. Returns the sums for the gates; sends for the next slice of pre."""
    WORDS: gl.constexpr = COLS // SLICES // 2
    LAYOUT: gl.constexpr = _in_slice(WORDS)
    dhidden = gl.convert_layout(_slice_of(packed, s, SLICES), LAYOUT, assert_trivial=True)
    mbarrier.wait(came, s & 1)
    x = pre.load(LAYOUT)
    if s + 1 < SLICES:
        _load_pre(pre_tiles, pre, came, row, column, s + 1, SLICES)
    elif not LAST:
        _load_pre(pre_tiles, pre, came, next_row, next_column, 0, SLICES)
    low, high = _unpair(x)
    dlow, dhigh = _unpair(dhidden)
    low, low_slope = _value_and_slope(low, MODE)
    high, high_slope = _value_and_slope(high, MODE)
    dot += gl.sum(dlow * low + dhigh * high, axis=1)
    y = _pair(dlow * low_slope * gate[:, None], dhigh * high_slope * gate[:, None])
    tma.store_wait(0)
    dpre.store(y)
    fence_async_shared()
    tma.async_copy_shared_to_global(dpre_tiles, [row, column // 2 + s * WORDS], dpre)
    return dot


@gluon.jit
def _down_and_differentiate(
    pre_tiles,
    dpre_tiles,
    parts_ptr,
    gates_ptr,
    index_ptr,
    a,
    b,
    ready,
    free,
    pre,
    dpre,
    came,
    C,
    WHICH: gl.constexpr,
    E: gl.constexpr,
    D: gl.constexpr,
    F: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    SLICES: gl.constexpr,
    MODE: gl.constexpr,
):
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, _in_slice(COLS // SLICES // 2))
    STEPS: gl.constexpr = D // DEPTH // SLICES
    EARLY: gl.constexpr = 1 + WHICH * (STEPS // 2)
    step = 0
    acc = gl.zeros((HALF, COLS), gl.float32, SUMS)
    packed = _packed(acc)
    gate = gl.zeros((HALF,), gl.float32, ROW)
    dot = gl.zeros((HALF,), gl.float32, ROW)
    row = 0
    column = 0
    rows = gl.arange(0, HALF, ROW)
    n_tiles = E * (C // ROWS) * (F // COLS)
    for tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        expert, next_row, next_column = _place(tile, C, F, GROUP)
        next_row += WHICH * HALF
        token = gl.load(index_ptr + next_row + rows)
        first = step
        if first == 0:
            _load_pre(pre_tiles, pre, came, next_row, next_column, 0, SLICES)
        for s in gl.static_range(SLICES):
            acc, step = _multiply(acc, step, first, a, b, ready, free, EARLY, WHICH, STAGES, False)
            if first > 0:
                dot = _differentiate(
                    packed,
                    gate,
                    dot,
                    row,
                    column,
                    next_row,
                    next_column,
                    pre_tiles,
                    dpre_tiles,
                    pre,
                    dpre,
                    came,
                    s,
                    SLICES,
                    False,
                    MODE,
                )
            acc, step = _multiply(
                acc, step, first, a, b, ready, free, STEPS - EARLY, WHICH, STAGES, False
            )
        if first > 0:
            gl.store(parts_ptr + (column // COLS) * (E * C) + row + rows, dot)
        gate = gl.load(gates_ptr + token * E + expert)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES))
        packed = _packed(acc)
        dot = gl.zeros((HALF,), gl.float32, ROW)
        row = next_row
        column = next_column
    if step > 0:
        for s in gl.static_range(SLICES):
            dot = _differentiate(
                packed,
                gate,
                dot,
                row,
                column,
                0,
                0,
                pre_tiles,
                dpre_tiles,
                pre,
                dpre,
                came,
                s,
                SLICES,
                True,
                MODE,
            )
        gl.store(parts_ptr + (column // COLS) * (E * C) + row + rows, dot)
    tma.store_wait(0)


@gluon.jit
def _down_gradient_gelu(
    a_tiles,
    b_tiles,
    pre_tiles,
    dpre_tiles,
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
    MODE: gl.constexpr,
):
    WORDS: gl.constexpr = COLS // SLICES // 2
    a = gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES, HALF, DEPTH], a_tiles.layout)
    b = gl.allocate_shared_memory(gl.bfloat16, [STAGES, DEPTH, COLS], b_tiles.layout)
    buf = gl.allocate_shared_memory(gl.int32, [4, HALF, WORDS], _shared(WORDS))
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    came = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    mbarrier.init(came.index(0), count=1)
    mbarrier.init(came.index(1), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _down_and_differentiate,
                (
                    pre_tiles,
                    dpre_tiles,
                    parts_ptr,
                    gates_ptr,
                    index_ptr,
                    a,
                    b,
                    ready,
                    free,
                    buf.index(0),
                    buf.index(1),
                    came.index(0),
                    C,
                    0,
                    E,
                    D,
                    F,
                    STAGES,
                    GROUP,
                    SLICES,
                    MODE,
                ),
            ),
            (
                _down_and_differentiate,
                (
                    pre_tiles,
                    dpre_tiles,
                    parts_ptr,
                    gates_ptr,
                    index_ptr,
                    a,
                    b,
                    ready,
                    free,
                    buf.index(2),
                    buf.index(3),
                    came.index(1),
                    C,
                    1,
                    E,
                    D,
                    F,
                    STAGES,
                    GROUP,
                    SLICES,
                    MODE,
                ),
            ),
            (_fetch, (a_tiles, b_tiles, a, b, ready, free, C, E, D, F, STAGES, GROUP, False)),
        ],
        [4, 1],
        [240, 24],
    )
