"""The kernel of `whole_token`: programs that stay, and meet between the parts of each layer.

What a program reads of a weight does not depend on what others compute, so the first block of the
next weight is on its way before the programs meet: the memory does not wait for them. The blocks of
a weight are dealt out in turn, so that every program has as many, but for one.
"""

import triton
import triton.language as tl

from pyper.kernels.activation import _value_and_slope
from pyper.kernels.overlap import ask_ahead
from pyper.kernels.paged_attention_kernel import _slots, attend
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
# Every phase at once; a single one is for machines that run one program after another.
ALL = tl.constexpr(-1)


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
def _address(table_ptr, layer, PLACE: tl.constexpr, dtype: tl.constexpr):
    address = tl.load(table_ptr + layer * N_NAMES + PLACE)
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def _arrive(counter_ptr, TOGETHER: tl.constexpr):
    """What this program has written can be seen by whoever sees it counted."""
    if TOGETHER:
        tl.debug_barrier()
        tl.atomic_add(counter_ptr, 1, sem="release")


@triton.jit
def _wait(counter_ptr, target, TOGETHER: tl.constexpr):
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


# Of a linear map, as constants: its rows, words of a row, rows of a block, programs, how it is
# stored, the activation behind it, whether it has a bias, whether a residual is added (MAP).


@triton.jit
def _block(weight, t, p, there, MAP: tl.constexpr):
    """Block t of a program: its words of four bytes, scales, biases and residual.

    Of SwiGLU the values' too. Who has none reads the last rows again, which are near, and stores
    nothing.
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
def _input(x_ptr, gain_ptr, eps, MAP: tl.constexpr, HAS_NORM: tl.constexpr):
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
    if STORED == "int8":
        sums = tl.sum(_times_int8(words, first, last, steps, HARDWARE), axis=0)
    else:
        sums = tl.sum(_times_widened(words, first, STORED), axis=1)
    return sums


@triton.jit
def _finish(block, row, t, p, out_ptr, MAP: tl.constexpr, HARDWARE: tl.constexpr):
    """Stores the outputs of block t: scale, bias, activation, residual, as `thin_linear` does."""
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
def _product(
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
    """A whole product whose first block is on its way."""
    BLOCKS: tl.constexpr = triton.cdiv(MAP[0], MAP[3] * MAP[2])
    row = _input(x_ptr, gain_ptr, eps, MAP, HAS_NORM)
    for t in range(BLOCKS - 1):
        following = _block(weight, t + 1, p, True, MAP)
        _finish(block, row, t, p, out_ptr, MAP, HARDWARE)
        block = following
    _finish(block, row, BLOCKS - 1, p, out_ptr, MAP, HARDWARE)


@triton.jit
def _weight(table_ptr, layer, PLACE: tl.constexpr, residual_ptr, dtype: tl.constexpr):
    """Words, scale and bias of a linear map, and what is added to what it gives."""
    words_ptr = _address(table_ptr, layer, PLACE, tl.int32)
    scale_ptr = _address(table_ptr, layer, PLACE + 1, tl.float32)
    return words_ptr, scale_ptr, _address(table_ptr, layer, PLACE + 2, dtype), residual_ptr


@triton.jit
def _ask_for_past(
    keys_ptr,
    values_ptr,
    pages_ptr,
    start,
    past,
    h,
    KV_HEADS: tl.constexpr,
    K: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The first keys and values that a program will attend to."""
    LINE: tl.constexpr = 1024 // keys_ptr.dtype.element_ty.primitive_bitwidth
    s = start + tl.arange(0, BLOCK_S)
    at = _slots(pages_ptr, s, past, PAGE)[:, None] * (KV_HEADS * K) + h * K
    at += LINE * tl.arange(0, max(BLOCK_K // LINE, 1))[None, :]
    ask_ahead(keys_ptr + at)
    ask_ahead(values_ptr + at)


@triton.jit
def _ask_for_gain(gain_ptr, p, D: tl.constexpr):
    """One of its lines of 128 bytes, by every program another: the row meets it in the cache."""
    LINE: tl.constexpr = 1024 // gain_ptr.dtype.element_ty.primitive_bitwidth
    ask_ahead(gain_ptr + (p * LINE + tl.zeros((1,), dtype=tl.int32)) % D)


@triton.jit
def whole_token_kernel(
    table_ptr,
    x_ptr,
    other_ptr,
    qkv_ptr,
    mixed_ptr,
    hidden_ptr,
    logits_ptr,
    part_ptr,
    log_sum_ptr,
    tickets_ptr,
    counter_ptr,
    pages_ptr,
    position_ptr,
    final_gain_ptr,
    head_ptr,
    head_scale_ptr,
    head_bias_ptr,
    first_layer,
    last_layer,
    eps,
    PHASE: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    H: tl.constexpr,
    KV_HEADS: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STORED: tl.constexpr,
    HEAD_STORED: tl.constexpr,
    QK_NORM: tl.constexpr,
    QKV_BIAS: tl.constexpr,
    OUT_BIAS: tl.constexpr,
    UP_BIAS: tl.constexpr,
    DOWN_BIAS: tl.constexpr,
    HEAD_BIAS: tl.constexpr,
    BLOCK_OF_D: tl.constexpr,
    BLOCK_OF_A: tl.constexpr,
    BLOCK_OF_F: tl.constexpr,
    BLOCK_OF_HEAD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PARTS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """See `whole_token`. BLOCK_OF_…: rows of a block of weights that read so many numbers."""
    p = tl.program_id(0)
    TOGETHER: tl.constexpr = PHASE == ALL
    PER_WORD: tl.constexpr = 2 if STORED == "bf16" else 4
    QKV_ROWS: tl.constexpr = (H + 2 * KV_HEADS) * K
    D_WORDS: tl.constexpr = D // PER_WORD
    QKV: tl.constexpr = (QKV_ROWS, D_WORDS, BLOCK_OF_D, PROGRAMS, STORED, "", QKV_BIAS, False)
    A_WORDS: tl.constexpr = H * K // PER_WORD
    OUT: tl.constexpr = (D, A_WORDS, BLOCK_OF_A, PROGRAMS, STORED, "", OUT_BIAS, True)
    UP: tl.constexpr = (F, D_WORDS, BLOCK_OF_D, PROGRAMS, STORED, ACTIVATION, UP_BIAS, False)
    F_WORDS: tl.constexpr = F // PER_WORD
    DOWN: tl.constexpr = (D, F_WORDS, BLOCK_OF_F, PROGRAMS, STORED, "", DOWN_BIAS, True)
    WORDS: tl.constexpr = D // (2 if HEAD_STORED == "bf16" else 4)
    HEAD: tl.constexpr = (V, WORDS, BLOCK_OF_HEAD, PROGRAMS, HEAD_STORED, "", HEAD_BIAS, False)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    target = 0
    position = tl.load(position_ptr).to(tl.int32)
    per_part = tl.cdiv(tl.cdiv(position, BLOCK_S), PARTS) * BLOCK_S
    start = p % PARTS * per_part
    past = tl.minimum(start + per_part, position)
    block = _block(_weight(table_ptr, first_layer, 1, x_ptr, dtype), 0, p, True, QKV)
    for layer in range(first_layer, last_layer):
        attention_gain = _address(table_ptr, layer, 0, dtype)
        qkv = _weight(table_ptr, layer, 1, x_ptr, dtype)
        query_gain = _address(table_ptr, layer, 4, dtype)
        key_gain = _address(table_ptr, layer, 5, dtype)
        cos = _address(table_ptr, layer, 6, tl.float32)
        sin = _address(table_ptr, layer, 7, tl.float32)
        keys = _address(table_ptr, layer, 8, dtype)
        values = _address(table_ptr, layer, 9, dtype)
        out = _weight(table_ptr, layer, 10, x_ptr, dtype)
        gain = _address(table_ptr, layer, 13, dtype)
        up = _weight(table_ptr, layer, 14, x_ptr, dtype)
        down = _weight(table_ptr, layer, 17, other_ptr, dtype)
        more = layer + 1 < last_layer
        if PHASE == ALL or PHASE == 0:
            _product(block, qkv, x_ptr, attention_gain, eps, qkv_ptr, p, QKV, True, HARDWARE)
            _arrive(counter_ptr, TOGETHER)
            if TOGETHER:
                block = _block(out, 0, p, True, OUT)
                if p < KV_HEADS * PARTS:
                    _ask_for_past(
                        *(keys, values, pages_ptr, start, past, p // PARTS),
                        *(KV_HEADS, K, PAGE, BLOCK_S, BLOCK_K),
                    )
            target += PROGRAMS
            _wait(counter_ptr, target, TOGETHER)
        if PHASE == ALL or PHASE == 1:
            if p < KV_HEADS * PARTS:
                attend(
                    *(qkv_ptr, qkv_ptr + H * K, qkv_ptr + (H + KV_HEADS) * K, keys, values),
                    *(pages_ptr, part_ptr, log_sum_ptr, mixed_ptr, tickets_ptr, cos, sin),
                    *(query_gain, key_gain, 0, 0, 0, K**-0.5, eps, position, start, past),
                    *(0, p // PARTS, p % PARTS, KV_HEADS, PARTS),
                    *(True, QK_NORM, PARTS > 1, PARTS),
                    *(K, H // KV_HEADS, PAGE, BLOCK_G, BLOCK_S, BLOCK_K, 2),
                )
            _arrive(counter_ptr, TOGETHER)
            if TOGETHER:
                _ask_for_gain(gain, p, D)
            target += PROGRAMS
            _wait(counter_ptr, target, TOGETHER)
        if PHASE == ALL or PHASE == 2:
            if not TOGETHER:
                block = _block(out, 0, p, True, OUT)
            _product(block, out, mixed_ptr, gain, eps, other_ptr, p, OUT, False, HARDWARE)
            _arrive(counter_ptr, TOGETHER)
            if TOGETHER:
                block = _block(up, 0, p, True, UP)
            target += PROGRAMS
            _wait(counter_ptr, target, TOGETHER)
        if PHASE == ALL or PHASE == 3:
            if not TOGETHER:
                block = _block(up, 0, p, True, UP)
            _product(block, up, other_ptr, gain, eps, hidden_ptr, p, UP, True, HARDWARE)
            _arrive(counter_ptr, TOGETHER)
            if TOGETHER:
                block = _block(down, 0, p, True, DOWN)
                if more:
                    _ask_for_gain(_address(table_ptr, layer + 1, 0, dtype), p, D)
            target += PROGRAMS
            _wait(counter_ptr, target, TOGETHER)
        if PHASE == ALL or PHASE == 4:
            if not TOGETHER:
                block = _block(down, 0, p, True, DOWN)
            _product(block, down, hidden_ptr, gain, eps, x_ptr, p, DOWN, False, HARDWARE)
            _arrive(counter_ptr, TOGETHER)
            target += PROGRAMS
        block = _block(_weight(table_ptr, layer + 1, 1, x_ptr, dtype), 0, p, more, QKV)
        if PHASE == ALL or PHASE == 4:
            _wait(counter_ptr, target, TOGETHER)
    if PHASE == ALL or PHASE == 5:
        head = head_ptr, head_scale_ptr, head_bias_ptr, x_ptr
        head_block = _block(head, 0, p, True, HEAD)
        _product(head_block, head, x_ptr, final_gain_ptr, eps, logits_ptr, p, HEAD, True, HARDWARE)
    if TOGETHER:  # the last to leave makes ready for the next token
        tl.debug_barrier()
        if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == target + PROGRAMS - 1:
            tl.store(counter_ptr, 0)
