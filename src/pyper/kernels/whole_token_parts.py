"""The parts of `whole_token_kernel`: addresses, meeting, blocks of weights, input, product.

A product goes block by block: `load_block` asks for one, `_finish` multiplies it and stores its
outputs. Whoever has the first block of a weight on its way can wait for the input meanwhile.
"""

import triton
import triton.language as tl

from pyper.kernels.activation import _value_and_slope
from pyper.kernels.overlap import ask_ahead
from pyper.kernels.row_int8 import _eight, _whole
from pyper.kernels.row_int8 import _times as _times_int8
from pyper.kernels.row_linear import _times as _times_widened

# Rows of the table of addresses: a layer's tensors in this order, 0 for what it does not have.
NAMES = (
    *("attention_gain", "qkv", "qkv_scale", "qkv_bias", "query_gain", "key_gain"),
    *("cos", "sin", "keys", "values", "out", "out_scale", "out_bias"),
    *("feed_forward_gain", "up", "up_scale", "up_bias", "down", "down_scale", "down_bias"),
)
N_NAMES = tl.constexpr(len(NAMES))
# Thread 0 of a program looks until the counter is as high as it should be.
LOOK = tl.constexpr("""{
    .reg .pred p;
    .reg .s32 seen;
    mov.u32 seen, %tid.x;
    setp.ne.s32 p, seen, 0;
    @p bra there;
look:
    ld.acquire.gpu.global.s32 seen, [$1];
    setp.lt.s32 p, seen, $2;
    @p bra look;
there:
    mov.s32 $0, 0;
}""")


@triton.jit
def address(table_ptr, layer, PLACE: tl.constexpr, dtype: tl.constexpr):
    """Of the tensor of a layer whose place in NAMES is PLACE."""
    number = tl.load(table_ptr + layer * N_NAMES + PLACE)
    return tl.multiple_of(number.to(tl.pointer_type(dtype)), 16)


@triton.jit
def arrive(counter_ptr, TOGETHER: tl.constexpr):
    """What this program has written can be seen by whoever sees it counted."""
    if TOGETHER:
        tl.debug_barrier()
        tl.atomic_add(counter_ptr, 1, sem="release")


@triton.jit
def wait(counter_ptr, target, TOGETHER: tl.constexpr):
    """Until so many have arrived; one thread looks, a thousand would hold up those who count.

    What others wrote is then read past this processor's own cache (".cg").
    """
    if TOGETHER:
        tl.inline_asm_elementwise(
            LOOK,
            "=r,l,r",
            [counter_ptr.to(tl.int64), target],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        tl.debug_barrier()


# MAP: what is known of a linear map when the kernel is built, a tuple of
#   0  N             rows of the weight, which are outputs (of SwiGLU half of them: the gates)
#   1  WORDS         words of four bytes in a row
#   2  BLOCK_N       rows of a block
#   3  PROGRAMS      that share the blocks: block t of program p has number t * PROGRAMS + p
#   4  STORED        "bf16", "int8" or "fp8"
#   5  ACTIVATION    of its outputs; "" for none
#   6  HAS_BIAS
#   7  HAS_RESIDUAL  whether outputs are added to a row


@triton.jit
def load_block(weight, t, p, there, MAP: tl.constexpr):
    """Block t of program p: its words of four bytes, scales, biases and residual.

    weight: as `linear_map` gives it. there: whether the weight exists, behind the last layer there
    is none. With SwiGLU a block is as many rows of gates and of values. Who has no block left reads
    the last rows again, which are near, and stores nothing.
    """
    words_ptr, scale_ptr, bias_ptr, residual_ptr = weight
    N: tl.constexpr = MAP[0]
    WORDS: tl.constexpr = MAP[1]
    BLOCK_N: tl.constexpr = MAP[2]
    PROGRAMS: tl.constexpr = MAP[3]
    STORED: tl.constexpr = MAP[4]
    GATED: tl.constexpr = MAP[5] == "swiglu"
    HAS_BIAS: tl.constexpr = MAP[6]
    HAS_RESIDUAL: tl.constexpr = MAP[7]
    BLOCK_W: tl.constexpr = triton.next_power_of_2(WORDS)
    place = tl.arange(0, BLOCK_N)
    if N % BLOCK_N:
        row = tl.minimum((t * PROGRAMS + p) * BLOCK_N, N - 1)
        place = tl.minimum(place, N - 1 - row)
    else:
        row = tl.minimum((t * PROGRAMS + p) * BLOCK_N, N - BLOCK_N)
    if STORED == "int8":  # (T, BLOCK_N, 4)
        T: tl.constexpr = BLOCK_W // 4
        w = (4 * tl.arange(0, T)[:, None] + tl.arange(0, 4)[None, :])[:, None, :]
        at = place[None, :, None] * WORDS + w
    else:  # (BLOCK_N, BLOCK_W)
        w = tl.arange(0, BLOCK_W)[None, :]
        at = place[:, None] * WORDS + w
    words_ptr += row.to(tl.int64) * WORDS
    inside = there & (w < WORDS)
    gates = tl.load(words_ptr + at, mask=inside, other=0)
    n = row + place
    behind = _behind(n, there, scale_ptr, bias_ptr, STORED != "bf16", HAS_BIAS)
    values, values_behind = gates, behind
    if GATED:
        values = tl.load(words_ptr + N * WORDS + at, mask=inside, other=0)
        values_behind = _behind(N + n, there, scale_ptr, bias_ptr, STORED != "bf16", HAS_BIAS)
    residual = n.to(tl.float32)  # not used
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + n, mask=there, other=0.0, cache_modifier=".cg")
        residual = residual.to(tl.float32)
    return gates, values, behind, values_behind, residual


@triton.jit
def _behind(n, there, scale_ptr, bias_ptr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Scales and biases of rows n."""
    scale = tl.full(n.shape, 1.0, dtype=tl.float32)
    bias = tl.zeros(n.shape, dtype=tl.float32)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + n, mask=there, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n, mask=there, other=0.0).to(tl.float32)
    return scale, bias


@triton.jit
def _load_input(x_ptr, gain_ptr, eps, MAP: tl.constexpr, HAS_NORM: tl.constexpr):
    """A row as its products take it (three tensors), and what their sums are multiplied by."""
    WORDS: tl.constexpr = MAP[1]
    STORED: tl.constexpr = MAP[4]
    BLOCK_W: tl.constexpr = triton.next_power_of_2(WORDS)
    PER_WORD: tl.constexpr = 2 if STORED == "bf16" else 4
    D: tl.constexpr = WORDS * PER_WORD
    scale = 1.0
    if STORED == "int8":
        T: tl.constexpr = BLOCK_W // 4
        at = 16 * tl.arange(0, T)[:, None] + tl.arange(0, 8)[None, :]
        squares = tl.zeros((T,), dtype=tl.float32)
        x, squares = _eight(x_ptr, gain_ptr, at, squares, D, HAS_NORM)
        more, squares = _eight(x_ptr, gain_ptr, at + 8, squares, D, HAS_NORM)
        first, last, steps = _whole(x, more)
    else:
        at = tl.arange(0, BLOCK_W * PER_WORD)
        x = tl.load(x_ptr + at, mask=at < D, other=0.0, cache_modifier=".cg").to(tl.float32)
        squares = x * x
        if HAS_NORM:
            gain = tl.load(gain_ptr + at, mask=at < D, other=0.0).to(tl.float32)
            # Rounded as where several rows are multiplied: one text or two, one result.
            x = (x * gain).to(x_ptr.dtype.element_ty).to(tl.float32)
        if STORED == "fp8":
            x *= 2.0**60  # half of what its weights lack; the other half comes at the end
            scale = 2.0**60
        first, last, steps = x, x, x
    if HAS_NORM:
        scale *= tl.rsqrt(tl.sum(squares, axis=0) / D + eps)
    return first, last, steps, scale


@triton.jit
def _sums(words, first, last, steps, STORED: tl.constexpr, HARDWARE: tl.constexpr):
    """Of each row of a block, its products with the input."""
    if STORED == "int8":
        sums = tl.sum(_times_int8(words, first, last, steps, HARDWARE), axis=0)
    else:
        sums = tl.sum(_times_widened(words, first, STORED), axis=1)
    return sums


@triton.jit
def _finish(block, row, t, p, out_ptr, MAP: tl.constexpr, HARDWARE: tl.constexpr):
    """Stores the outputs of block t: scale, bias, activation, residual, as `thin_linear` does.

    block, row: as `load_block` and `_load_input` give them.
    """
    N: tl.constexpr = MAP[0]
    BLOCK_N: tl.constexpr = MAP[2]
    PROGRAMS: tl.constexpr = MAP[3]
    STORED: tl.constexpr = MAP[4]
    ACTIVATION: tl.constexpr = MAP[5]
    HAS_RESIDUAL: tl.constexpr = MAP[7]
    n = (t * PROGRAMS + p) * BLOCK_N + tl.arange(0, BLOCK_N)
    gates, values, behind, values_behind, residual = block
    first, last, steps, norm = row
    scale, bias = behind
    total = norm * _sums(gates, first, last, steps, STORED, HARDWARE) * scale + bias
    if ACTIVATION != "":
        total, _ = _value_and_slope(total, ACTIVATION)
    if ACTIVATION == "swiglu":
        scale, bias = values_behind
        total *= norm * _sums(values, first, last, steps, STORED, HARDWARE) * scale + bias
    if HAS_RESIDUAL:
        # As two operations would: the product is rounded before it is added.
        total = total.to(out_ptr.dtype.element_ty).to(tl.float32) + residual
    tl.store(out_ptr + n, total, mask=n < N)


@triton.jit
def product(
    block,
    weight,
    x_ptr,
    gain_ptr,
    eps,
    out_ptr,
    p,
    MAP: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """A linear map of the row at x, whose first block is on its way; the others follow it.

    HAS_NORM: the row is normalised first, with this gain.
    """
    BLOCKS: tl.constexpr = triton.cdiv(MAP[0], MAP[3] * MAP[2])
    row = _load_input(x_ptr, gain_ptr, eps, MAP, HAS_NORM)
    for t in range(BLOCKS - 1):
        following = load_block(weight, t + 1, p, True, MAP)
        _finish(block, row, t, p, out_ptr, MAP, HARDWARE)
        block = following
    _finish(block, row, BLOCKS - 1, p, out_ptr, MAP, HARDWARE)


@triton.jit
def linear_map(table_ptr, layer, PLACE: tl.constexpr, residual_ptr, dtype: tl.constexpr):
    """Where its words, scales and biases are (PLACE in NAMES), and what is added to its outputs."""
    words_ptr = address(table_ptr, layer, PLACE, tl.int32)
    scale_ptr = address(table_ptr, layer, PLACE + 1, tl.float32)
    return words_ptr, scale_ptr, address(table_ptr, layer, PLACE + 2, dtype), residual_ptr


@triton.jit
def ask_for_gain(gain_ptr, p, D: tl.constexpr):
    """Asks for one of its lines of 128 bytes, each program for another."""
    LINE: tl.constexpr = 1024 // gain_ptr.dtype.element_ty.primitive_bitwidth
    ask_ahead(gain_ptr + (p * LINE + tl.zeros((1,), dtype=tl.int32)) % D)
