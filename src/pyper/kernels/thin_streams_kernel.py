"""`thin_linear` on Hopper: the copy engine fills a ring of weights before the kernel may begin.

While the kernel before still runs, each program has as many weights sent into its processor's
shared memory as there is room for; what it waits for is no weight then but only x. Written in
Triton's lower language (Gluon), which has no interpreter and may change from version to version:
`thin_streams` imports this file where it was tried.
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

from pyper.kernels.overlap import ask_ahead, wait_for_others
from pyper.kernels.thin_linear_kernel import finish, joined

DEPTH = gl.constexpr(64)
"""Inputs of a step: a line of 128 bytes of each row."""
TILE_LAYOUT = gl.NVMMASharedLayout(128, 16, 2)


@gluon.jit
def thin_streams(
    x_tiles,
    weight_tiles,
    weight_ptr,
    squares_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    next_gain_ptr,
    next_ptr,
    next_squares_ptr,
    part_ptr,
    tickets_ptr,
    B,
    eps,
    N: gl.constexpr,
    D: gl.constexpr,
    ACTIVATION: gl.constexpr,
    N_SQUARES: gl.constexpr,
    SQUARES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    HAS_NEXT: gl.constexpr,
    N_SPLITS: gl.constexpr,
    BLOCK_B: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    LINES: gl.constexpr,
    WARM: gl.constexpr,
    OVERLAP: gl.constexpr = False,
):
    """As `thin_linear_block`, of whole blocks: D = 64 · N_SPLITS · steps, N of BLOCK_N.

    STAGES: steps that are on their way; LINES: those of the weight that come near behind them.
    SQUARES: the power of two that holds N_SQUARES. WARM: the engine reads how x lies before it may
    read x. Warps are four, or eight for 128 outputs.
    """
    STEPS: gl.constexpr = D // (DEPTH * N_SPLITS)
    WARPS: gl.constexpr = gl.num_warps()
    # Outputs side by side in a thread: eight of bf16 are one store.
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, WARPS], [0, 1])
    row = gl.program_id(0) * BLOCK_N
    first = gl.program_id(1) * (STEPS * DEPTH)
    n = row + gl.arange(0, BLOCK_N, gl.SliceLayout(1, OUT))
    b = gl.arange(0, BLOCK_B, gl.SliceLayout(0, OUT))
    BYTES: gl.constexpr = (BLOCK_N + BLOCK_B) * DEPTH * 2
    weights = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_N, DEPTH], TILE_LAYOUT)
    rows = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_B, DEPTH], TILE_LAYOUT)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES + 1):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    for k in gl.static_range(STAGES):
        # Ready when the rows have come as well, which nobody has sent for yet.
        bar = ready.index(k)
        mbarrier.expect(bar, BYTES, pred=k < STEPS)
        at = [row, first + k * DEPTH]
        tma.async_copy_global_to_shared(weight_tiles, at, bar, weights.index(k), pred=k < STEPS)
    # Others may be writing x: what comes now is not used.
    WARMS: gl.constexpr = WARM and OVERLAP
    mbarrier.expect(ready.index(STAGES), BLOCK_B * DEPTH * 2, pred=WARMS)
    tma.async_copy_global_to_shared(
        x_tiles, [0, first], ready.index(STAGES), rows.index(0), pred=WARMS
    )
    if LINES > 0:
        NEAR: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [2, WARPS // 2], [0, 1])
        line = gl.arange(0, LINES, gl.SliceLayout(0, NEAR))[None, :] * DEPTH
        line += (row + gl.arange(0, BLOCK_N, gl.SliceLayout(1, NEAR)))[:, None] * D
        ask_ahead(weight_ptr + first + STAGES * DEPTH + line)
    wait_for_others(OVERLAP)
    if WARMS:
        mbarrier.wait(ready.index(STAGES), 0)
    for k in gl.static_range(STAGES):
        at = [0, first + k * DEPTH]
        tma.async_copy_global_to_shared(x_tiles, at, ready.index(k), rows.index(k), pred=k < STEPS)
    if N_SQUARES > 0:  # asked for here, used behind the loop
        PARTS: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])
        part = gl.arange(0, SQUARES, gl.SliceLayout(1, PARTS))[:, None]
        text = gl.arange(0, BLOCK_B, gl.SliceLayout(0, PARTS))[None, :]
        known = (part < N_SQUARES) & (text < B)
        of_parts = gl.load(squares_ptr + part * B + text, mask=known, other=0.0)
    acc = gl.zeros(
        (BLOCK_N, BLOCK_B),
        gl.float32,
        gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_B, 16]),
    )
    for k in range(STEPS):
        stage = k % STAGES
        mbarrier.wait(ready.index(stage), (k // STAGES) & 1)
        x = rows.index(stage).permute((1, 0))
        acc = warpgroup_mma(weights.index(stage), x, acc, use_acc=True, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        gl.thread_barrier()  # all warps are done with the step before; its places are free
        free = (k + STAGES - 1) % STAGES
        more = (k > 0) & (k - 1 + STAGES < STEPS)
        column = first + (k - 1 + STAGES) * DEPTH
        bar = ready.index(free)
        mbarrier.expect(bar, BYTES, pred=more)
        place = weights.index(free)
        tma.async_copy_global_to_shared(weight_tiles, [row, column], bar, place, pred=more)
        tma.async_copy_global_to_shared(x_tiles, [0, column], bar, rows.index(free), pred=more)
    acc = warpgroup_mma_wait(0, deps=[acc])
    gl.thread_barrier()  # all have read: what follows may use the places for itself
    sums = gl.convert_layout(acc, OUT)
    if N_SQUARES > 0:
        squares = gl.convert_layout(gl.sum(of_parts, axis=0), gl.SliceLayout(0, OUT))
        sums *= gl.rsqrt(squares / D + eps)[None, :]
    added = (None, bias_ptr, residual_ptr)
    outputs = (out_ptr, next_gain_ptr, next_ptr, next_squares_ptr)
    if N_SPLITS == 1:
        finish(
            *(sums, sums, n, b, added, outputs, B, N, ACTIVATION, False, HAS_BIAS),
            *(HAS_RESIDUAL, HAS_NEXT),
        )
    else:
        at = b[None, :] * N + n[:, None]
        gl.store(part_ptr + gl.program_id(1) * (N * BLOCK_B) + at, sums)
        gl.thread_barrier()  # all threads have stored their part of the part
        ticket = tickets_ptr + gl.program_id(0)
        if gl.atomic_add(ticket, 1, sem="acq_rel") == N_SPLITS - 1:
            gl.thread_barrier()
            sums = joined(part_ptr, at, N_SPLITS, N * BLOCK_B)
            finish(
                *(sums, sums, n, b, added, outputs, B, N, ACTIVATION, False, HAS_BIAS),
                *(HAS_RESIDUAL, HAS_NEXT),
            )
            gl.store(ticket, 0)
