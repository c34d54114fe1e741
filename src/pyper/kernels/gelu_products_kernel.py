"""Products around GELU on Hopper, where GELU runs behind the next tile's products.

Each multiprocessor keeps one program, which goes from tile to tile. One warp fetches; two groups of
four warps multiply 64 × 256 numbers each. A finished tile is packed into half of the registers, and
its activation is done slice by slice between the products of the next tile, while the tensor cores
are busy: neither the activation nor its stores hold them up.

Triton's lower language (Gluon) says which warps do what. Its interpreter does not exist, and it may
change from version to version: `gelu_products` imports this file where it was tried.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from pyper.kernels.gelu_slices_kernel import (
    BUFFER_LAYOUT,
    IN_SLICE,
    SLICES,
    WORDS,
    finish,
    packed,
    send_for,
)

ROWS, COLS, DEPTH = gl.constexpr(128), gl.constexpr(256), gl.constexpr(64)
"""Of a tile, and of one step of its products."""
HALF = gl.constexpr(64)
STAGES = gl.constexpr(4)
"""Steps that are fetched ahead."""
GROUP = gl.constexpr(16)
"""Tile rows that go together through the weight."""
TILE_LAYOUT = gl.NVMMASharedLayout(128, 16, 2)


@gluon.jit
def _n_tiles(C, E: gl.constexpr, F: gl.constexpr):
    return E * (C // ROWS) * (F // COLS)


@gluon.jit
def _place(tile, C, F: gl.constexpr):
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
    a_tiles, b_tiles, ring, C, E: gl.constexpr, D: gl.constexpr, F: gl.constexpr, BACK: gl.constexpr
):
    """What all tiles of this program need, as far ahead as the ring allows."""
    a, b, ready, free = ring
    step = 0
    for tile in range(gl.program_id(0), _n_tiles(C, E, F), gl.num_programs(0)):
        expert, row, column = _place(tile, C, F)
        for k in range(0, D, DEPTH):
            stage = step % STAGES
            mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)
            bar = ready.index(stage)
            mbarrier.expect(bar, (ROWS + COLS) * DEPTH * 2)
            tma.async_copy_global_to_shared(a_tiles, [row, k], bar, a.index(2 * stage))
            tma.async_copy_global_to_shared(a_tiles, [row + HALF, k], bar, a.index(2 * stage + 1))
            if BACK:
                at = [expert * D + k, column]
            else:
                at = [expert * F + column, k]
            tma.async_copy_global_to_shared(b_tiles, at, bar, b.index(stage))
            step += 1


@gluon.jit
def _multiply(acc, step, first, ring, N: gl.constexpr, WHICH: gl.constexpr, BACK: gl.constexpr):
    """N steps in depth. The last one is still running on return."""
    a, b, ready, free = ring
    for _ in range(N):
        stage = step % STAGES
        mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
        weight = b.index(stage)
        if not BACK:
            weight = weight.permute((1, 0))
        rows = a.index(2 * stage + WHICH)
        acc = warpgroup_mma(rows, weight, acc, use_acc=step > first, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), pred=step > first)
        step += 1
    return acc, step


@gluon.jit
def _work(
    out,
    parts_ptr,
    gates_ptr,
    index_ptr,
    ring,
    C,
    WHICH: gl.constexpr,
    E: gl.constexpr,
    D: gl.constexpr,
    F: gl.constexpr,
    BACK: gl.constexpr,
    GATED: gl.constexpr,
    AGAIN: gl.constexpr,
):
    """One of two groups of warps: its 64 rows of each tile."""
    ROW: gl.constexpr = gl.SliceLayout(1, IN_SLICE)
    STEPS: gl.constexpr = D // DEPTH // SLICES
    # The groups take turns: one activates while the other multiplies.
    EARLY: gl.constexpr = 1 + WHICH * (STEPS // 2)
    tiles, buffers, came = out
    free = ring[3]
    rows = gl.arange(0, HALF, ROW)
    acc = gl.zeros(
        (HALF, COLS), gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    )
    parts = packed(acc)
    gate = gl.zeros((HALF,), gl.float32, ROW)
    dot = gl.zeros((HALF,), gl.float32, ROW)
    step = 0
    row = 0
    word = 0
    for tile in range(gl.program_id(0), _n_tiles(C, E, F), gl.num_programs(0)):
        expert, next_row, next_column = _place(tile, C, F)
        next_row += WHICH * HALF
        next_word = next_column // 2
        if GATED:
            token = gl.load(index_ptr + next_row + rows).to(gl.int32)
        first = step
        if BACK:
            send_for(tiles[0], [next_row, next_word], came, buffers[0], first == 0)
        # A share of this tile's products, and a slice of the last tile while some of them run.
        for s in range(SLICES):
            acc, step = _multiply(acc, step, first, ring, EARLY, WHICH, BACK)
            if first > 0:
                last = (gate, dot, row, word)
                next_at = (next_row, next_word)
                dot = finish(parts[0], last, s, next_at, True, out, BACK, GATED, AGAIN)
            acc, step = _multiply(acc, step, first, ring, STEPS - EARLY, WHICH, BACK)
            parts = parts[1:] + parts[:1]
        if BACK and GATED:
            if first > 0:
                gl.store(parts_ptr + word // (COLS // 2) * (E * C) + row + rows, dot)
            dot = gl.zeros((HALF,), gl.float32, ROW)
        if GATED:
            gate = gl.load(gates_ptr + token * E + expert)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES))
        parts = packed(acc)
        row = next_row
        word = next_word
    if step > 0:
        for s in gl.static_range(SLICES):
            last = (gate, dot, row, word)
            dot = finish(parts[s], last, s, (0, 0), False, out, BACK, GATED, AGAIN)
        if BACK and GATED:
            gl.store(parts_ptr + word // (COLS // 2) * (E * C) + row + rows, dot)
    tma.store_wait(0)


@gluon.jit
def product(
    a_tiles,
    b_tiles,
    pre_tiles,
    out_tiles,
    again_tiles,
    parts_ptr,
    gates_ptr,
    index_ptr,
    C,
    E: gl.constexpr,
    D: gl.constexpr,
    F: gl.constexpr,
    BACK: gl.constexpr,
    GATED: gl.constexpr,
    AGAIN: gl.constexpr,
):
    """Forward: pre and the hidden rows (out).

    Backward: of pre the gradient dpre (out), the hidden rows again, and sums for the gates (parts).
    """
    a = gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES, HALF, DEPTH], a_tiles.layout)
    if BACK:
        b = gl.allocate_shared_memory(gl.bfloat16, [STAGES, DEPTH, COLS], b_tiles.layout)
    else:
        b = gl.allocate_shared_memory(gl.bfloat16, [STAGES, COLS, DEPTH], b_tiles.layout)
    buffers = gl.allocate_shared_memory(gl.int32, [4 + 2 * AGAIN, HALF, WORDS], BUFFER_LAYOUT)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    came = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(came.index(i), count=1)
    fence_async_shared()
    ring = (a, b, ready, free)
    tiles = (pre_tiles, out_tiles, again_tiles)
    # Where nothing is written again, the third buffer stands for nothing.
    buffers_0 = (buffers.index(0), buffers.index(1), buffers.index(4 * AGAIN))
    buffers_1 = (buffers.index(2), buffers.index(3), buffers.index(5 * AGAIN))
    out_0 = (tiles, buffers_0, came.index(0))
    out_1 = (tiles, buffers_1, came.index(1))
    gl.warp_specialize(
        [
            (
                _work,
                (out_0, parts_ptr, gates_ptr, index_ptr, ring, C, 0, E, D, F, BACK, GATED, AGAIN),
            ),
            (
                _work,
                (out_1, parts_ptr, gates_ptr, index_ptr, ring, C, 1, E, D, F, BACK, GATED, AGAIN),
            ),
            (_fetch, (a_tiles, b_tiles, ring, C, E, D, F, BACK)),
        ],
        [4, 1],
        [240, 24],
    )
