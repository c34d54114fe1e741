"""The kernel of `thin_stream`: a ring of tiles in shared memory, filled as far ahead as it goes."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from pyper.kernels.activation import _value_and_slope

TILE_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
# Sixteen bytes a thread, of a tile's rows and of what is written: there, outputs are neighbours.
LOAD_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
OUT_LAYOUT = gl.constexpr(gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1]))
SQUARES_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 1], [2, 16], [4, 1], [1, 0]))


@gluon.jit
def _send_for(ring, rows, tile, STAGES: gl.constexpr, INPUTS: gl.constexpr):
    async_copy.async_copy_global_to_shared(ring.index(tile % STAGES), rows + tile * INPUTS)


@gluon.jit
def _row_scales(known, eps, D: gl.constexpr, LAYOUT: gl.constexpr):
    """1 / √(mean square + eps), for rows of a product (OUTPUTS, BLOCK_B), of parts of the sums."""
    scales = gl.rsqrt(gl.sum(known, axis=0) / D + eps)
    return gl.convert_layout(scales, gl.SliceLayout(0, LAYOUT))[None, :]


@gluon.jit
def _finish(sums, block, added, outputs, B, N: gl.constexpr, ACTIVATION: gl.constexpr):
    """What follows the sums (OUTPUTS, BLOCK_B), and the stores."""
    bias_ptr, residual_ptr = added
    out_ptr, next_gain_ptr, next_ptr, next_squares_ptr = outputs
    sums = gl.convert_layout(sums, OUT_LAYOUT)
    OUTPUTS: gl.constexpr = sums.shape[0]
    n = block * OUTPUTS + gl.arange(0, OUTPUTS, gl.SliceLayout(1, OUT_LAYOUT))
    b = gl.arange(0, sums.shape[1], gl.SliceLayout(0, OUT_LAYOUT))
    if bias_ptr is not None:
        sums += gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
    if ACTIVATION != "":
        sums, _ = _value_and_slope(sums, ACTIVATION)
    at = b.to(gl.int64)[None, :] * N + n[:, None]
    there = (n < N)[:, None] & (b < B)[None, :]
    if residual_ptr is not None:
        # As two operations would: the product is rounded before it is added.
        sums = sums.to(gl.bfloat16).to(gl.float32)
        sums += gl.load(residual_ptr + at, mask=there, other=0.0).to(gl.float32)
    out = sums.to(gl.bfloat16)
    gl.store(out_ptr + at, out, mask=there)
    if next_gain_ptr is not None:
        wide = gl.where(there, out.to(gl.float32), 0.0)
        gain = gl.load(next_gain_ptr + n, mask=n < N, other=0.0).to(gl.float32)
        gl.store(next_ptr + at, (wide * gain[:, None]).to(gl.bfloat16), mask=there)
        squares = gl.sum(wide * wide, axis=0)
        gl.store(next_squares_ptr + block * B + b, squares, mask=b < B)


@gluon.jit
def _joined(part_ptr, at, size, N_SPLITS: gl.constexpr):
    """The sum of all parts, in their order."""
    # Others may have written them: not from a cache of this processor.
    total = gl.load(part_ptr + at, cache_modifier=".cg")
    for part in gl.static_range(1, N_SPLITS):
        total += gl.load(part_ptr + part * size + at, cache_modifier=".cg")
    return total


@gluon.jit(do_not_specialize=["B"])
def stream(
    x_ptr,
    weight_ptr,
    bias_ptr,
    squares_ptr,
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
    BLOCK_SQUARES: gl.constexpr,
    N_SPLITS: gl.constexpr,
    OUTPUTS: gl.constexpr,
    INPUTS: gl.constexpr,
    BLOCK_B: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A block of outputs from a part of the inputs; program (block, part).

    N_SQUARES > 0: x is to be normalised; its gain is in it, and so many parts of the sum of its
    squares are known.
    """
    # A tile is written again when the products of the tile two before are done.
    AHEAD: gl.constexpr = STAGES - 2
    N_TILES: gl.constexpr = D // N_SPLITS // INPUTS
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_B, 16])
    block, part = gl.program_id(0), gl.program_id(1)
    # What lies beyond the matrix or the rows is read again, not masked, and never stored.
    n = block * OUTPUTS + gl.arange(0, OUTPUTS, gl.SliceLayout(1, LOAD_LAYOUT))
    b = gl.minimum(gl.arange(0, BLOCK_B, gl.SliceLayout(1, LOAD_LAYOUT)), B - 1)
    d = part * (D // N_SPLITS) + gl.arange(0, INPUTS, gl.SliceLayout(0, LOAD_LAYOUT))
    weight_rows = weight_ptr + gl.minimum(n, N - 1).to(gl.int64)[:, None] * D + d[None, :]
    x_rows = x_ptr + b[:, None] * D + d[None, :]
    weights = gl.allocate_shared_memory(gl.bfloat16, [STAGES, OUTPUTS, INPUTS], TILE_LAYOUT)
    rows = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_B, INPUTS], TILE_LAYOUT)
    for tile in gl.static_range(AHEAD):
        if tile < N_TILES:
            _send_for(weights, weight_rows, tile, STAGES, INPUTS)
        async_copy.commit_group()
    gdc_wait()  # the kernels before this one have ended: what they wrote is there
    gdc_launch_dependents()
    for tile in gl.static_range(AHEAD):
        if tile < N_TILES:
            _send_for(rows, x_rows, tile, STAGES, INPUTS)
        async_copy.commit_group()
    if N_SQUARES > 0:  # asked for here, used behind the loop
        p = gl.arange(0, BLOCK_SQUARES, gl.SliceLayout(1, SQUARES_LAYOUT))
        c = gl.arange(0, BLOCK_B, gl.SliceLayout(0, SQUARES_LAYOUT))
        there = (p < N_SQUARES)[:, None] & (c < B)[None, :]
        known = gl.load(squares_ptr + p[:, None] * B + c[None, :], mask=there, other=0.0)
    sums = gl.zeros((OUTPUTS, BLOCK_B), gl.float32, LAYOUT)
    for tile in range(N_TILES):
        async_copy.wait_group(AHEAD - 1)
        fence_async_shared()
        gl.thread_barrier()
        if tile + AHEAD < N_TILES:
            _send_for(weights, weight_rows, tile + AHEAD, STAGES, INPUTS)
            _send_for(rows, x_rows, tile + AHEAD, STAGES, INPUTS)
        async_copy.commit_group()
        at = tile % STAGES
        of_rows = rows.index(at).permute((1, 0))
        sums = warpgroup_mma(weights.index(at), of_rows, sums, is_async=True)
        sums = warpgroup_mma_wait(1, deps=[sums])
    sums = warpgroup_mma_wait(0, deps=[sums])
    if N_SQUARES > 0:
        sums *= _row_scales(known, eps, D, LAYOUT)
    added = (bias_ptr, residual_ptr)
    outputs = (out_ptr, next_gain_ptr, next_ptr, next_squares_ptr)
    if N_SPLITS == 1:
        _finish(sums, block, added, outputs, B, N, ACTIVATION)
    else:
        n = gl.arange(0, OUTPUTS, gl.SliceLayout(1, LAYOUT))
        b = gl.arange(0, BLOCK_B, gl.SliceLayout(0, LAYOUT))
        at_part = (block * OUTPUTS + n)[:, None] * BLOCK_B + b[None, :]
        size = gl.num_programs(0) * (OUTPUTS * BLOCK_B)
        gl.store(part_ptr + part * size + at_part, sums)
        gl.thread_barrier()  # all threads have stored their part of the part
        ticket = tickets_ptr + block
        if gl.atomic_add(ticket, 1, sem="acq_rel") == N_SPLITS - 1:
            gl.thread_barrier()
            sums = _joined(part_ptr, at_part, size, N_SPLITS)
            _finish(sums, block, added, outputs, B, N, ACTIVATION)
            gl.store(ticket, 0)
