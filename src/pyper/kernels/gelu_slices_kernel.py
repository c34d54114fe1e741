"""What `gelu_products_kernel` does to a finished tile, slice by slice: GELU, gates, and stores.

A slice is 64 rows of 16 words, two numbers of bf16 each: a thread holds eight words.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from pyper.kernels.activation import _normal_tail

SLICES, WORDS = gl.constexpr(8), gl.constexpr(16)
"""Parts of a tile whose activation is done at once, and their width: two numbers a word."""
# 64 rows of 16 words, as the copy engine wants them.
WORDS_LAYOUT = gl.NVMMASharedLayout(64, 32, 2)
# Which thread holds which words of a slice: as the products leave them.
IN_SLICE = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[8, 0], [0, 4], [0, 8]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 16],
    )
)
BUFFER_LAYOUT = gl.constexpr(WORDS_LAYOUT)


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
        parts = (gl.convert_layout(x, IN_SLICE, assert_trivial=True),)
    else:
        halves = gl.reshape(x, (x.shape[0], 2, x.shape[1] // 2))
        left, right = gl.split(gl.permute(halves, (0, 2, 1)))
        parts = _slices(left, N // 2) + _slices(right, N // 2)
    return parts


@gluon.jit
def packed(acc):
    """The sums as bf16, two in a word, in slices."""
    low, high = gl.split(gl.reshape(acc, (acc.shape[0], acc.shape[1] // 2, 2)))
    return _slices(_pair(low, high), SLICES)


@gluon.jit
def _value_and_slope(x):
    """GELU and its derivative."""
    tail, bell = _normal_tail(x)
    value = gl.maximum(x, 0.0) - gl.abs(x) * tail
    slope = gl.where(x > 0, 1.0 - tail, tail) + x * bell * 0.3989422804014327
    return value, slope


@gluon.jit
def _weighed(low, high, gate, GATED: gl.constexpr):
    """Both numbers by the gate of their row, as one word."""
    if GATED:
        low *= gate[:, None]
        high *= gate[:, None]
    return _pair(low, high)


@gluon.jit
def _activate(x, gate, place, out, GATED: gl.constexpr):
    """Writes a slice of pre and of the hidden rows."""
    tiles, buffers, _ = out
    low, high = _unpair(x)
    low, _ = _value_and_slope(low)
    high, _ = _value_and_slope(high)
    y = _weighed(low, high, gate, GATED)
    tma.store_wait(0)
    buffers[0].store(x)
    buffers[1].store(y)
    fence_async_shared()
    tma.async_copy_shared_to_global(tiles[0], place, buffers[0])
    tma.async_copy_shared_to_global(tiles[1], place, buffers[1])


@gluon.jit
def _differentiate(
    dhidden, gate, dot, s, place, next_place, more, out, GATED: gl.constexpr, AGAIN: gl.constexpr
):
    """Writes a slice of dpre (and of the hidden rows) and sends for the next one of pre.

    Returns the sums for the gates.
    """
    tiles, buffers, came = out
    mbarrier.wait(came, s & 1)
    x = buffers[0].load(dhidden.type.layout)
    send_for(tiles[0], next_place, came, buffers[0], more)
    low, high = _unpair(x)
    dlow, dhigh = _unpair(dhidden)
    low, low_slope = _value_and_slope(low)
    high, high_slope = _value_and_slope(high)
    y = _weighed(dlow * low_slope, dhigh * high_slope, gate, GATED)
    if GATED:
        dot += gl.sum(dlow * low + dhigh * high, axis=1)
    tma.store_wait(0)
    buffers[1].store(y)
    if AGAIN:
        buffers[2].store(_weighed(low, high, gate, GATED))
    fence_async_shared()
    tma.async_copy_shared_to_global(tiles[1], place, buffers[1])
    if AGAIN:
        tma.async_copy_shared_to_global(tiles[2], place, buffers[2])
    return dot


@gluon.jit
def send_for(tiles, place, came, buffer, wanted):
    mbarrier.expect(came, buffer.shape[0] * buffer.shape[1] * 4, pred=wanted)
    tma.async_copy_global_to_shared(tiles, place, came, buffer, pred=wanted)


@gluon.jit
def finish(
    x, last, s, next_at, more, out, BACK: gl.constexpr, GATED: gl.constexpr, AGAIN: gl.constexpr
):
    """Slice s of the last tile (gate, dot, row, column in words); `more` tiles follow."""
    gate, dot, row, word = last
    place = [row, word + s * WORDS]
    if BACK:
        ends = s == SLICES - 1
        next_row, next_word = next_at
        next_place = [gl.where(ends, next_row, row), gl.where(ends, next_word, place[1] + WORDS)]
        wanted = more | (s < SLICES - 1)
        dot = _differentiate(x, gate, dot, s, place, next_place, wanted, out, GATED, AGAIN)
    else:
        _activate(x, gate, place, out, GATED)
    return dot
