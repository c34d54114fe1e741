"""The kernel of `whole_token`: programs that stay, and meet after each phase of a layer.

    phase   from              computes                    gives          meanwhile asks for
    0       x                 norm, queries, keys, values qkv            out, keys and values
    1       qkv, the past     RoPE, attention in parts    mixed          gain of the next norm
    2       mixed, x          out, added to x             other          up
    3       other             norm, up, activation        hidden         down, the next gain
    4       hidden, other     down, added to other        x              qkv of the next layer
    5       x, at the end     norm, head                  logits

What a program reads of a weight does not depend on what others compute, so the first block of the
next weight is on its way before the programs meet: the memory does not wait for them. The blocks of
a weight are dealt out in turn, so that every program has as many, but for one.
"""

import triton
import triton.language as tl

from pyper.kernels.attend_kernel import ask_for_past, attend, part_of_past
from pyper.kernels.whole_token_parts import (
    address,
    arrive,
    ask_for_gain,
    linear_map,
    load_block,
    product,
    wait,
)

# Every phase at once; a single one is for machines that run one program after another.
ALL = tl.constexpr(-1)


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
    start, past = part_of_past(position, p % PARTS, PARTS, BLOCK_S)
    block = load_block(linear_map(table_ptr, first_layer, 1, x_ptr, dtype), 0, p, True, QKV)
    for layer in range(first_layer, last_layer):
        attention_gain = address(table_ptr, layer, 0, dtype)
        qkv = linear_map(table_ptr, layer, 1, x_ptr, dtype)
        query_gain = address(table_ptr, layer, 4, dtype)
        key_gain = address(table_ptr, layer, 5, dtype)
        cos = address(table_ptr, layer, 6, tl.float32)
        sin = address(table_ptr, layer, 7, tl.float32)
        keys = address(table_ptr, layer, 8, dtype)
        values = address(table_ptr, layer, 9, dtype)
        out = linear_map(table_ptr, layer, 10, x_ptr, dtype)
        gain = address(table_ptr, layer, 13, dtype)
        up = linear_map(table_ptr, layer, 14, x_ptr, dtype)
        down = linear_map(table_ptr, layer, 17, other_ptr, dtype)
        more = layer + 1 < last_layer
        if PHASE == ALL or PHASE == 0:
            product(block, qkv, x_ptr, attention_gain, eps, qkv_ptr, p, QKV, True, HARDWARE)
            arrive(counter_ptr, TOGETHER)
            if TOGETHER:
                block = load_block(out, 0, p, True, OUT)
                if p < KV_HEADS * PARTS:
                    ask_for_past(
                        *(keys, values, pages_ptr, start, past, p // PARTS),
                        *(KV_HEADS, K, PAGE, 1, BLOCK_S, BLOCK_K),
                    )
            target += PROGRAMS
            wait(counter_ptr, target, TOGETHER)
        if PHASE == ALL or PHASE == 1:
            if p < KV_HEADS * PARTS:
                attend(
                    *(qkv_ptr, qkv_ptr + H * K, qkv_ptr + (H + KV_HEADS) * K, keys, values),
                    *(pages_ptr, part_ptr, log_sum_ptr, mixed_ptr, tickets_ptr, cos, sin),
                    *(query_gain, key_gain, 0, 0, 0, K**-0.5, eps, position, start, past),
                    *(0, p // PARTS, p % PARTS, KV_HEADS, PARTS),
                    *(True, QK_NORM, True, PARTS),
                    *(K, H // KV_HEADS, PAGE, 1, BLOCK_G, BLOCK_S, BLOCK_K, 2),
                )
            arrive(counter_ptr, TOGETHER)
            if TOGETHER:
                ask_for_gain(gain, p, D)
            target += PROGRAMS
            wait(counter_ptr, target, TOGETHER)
        if PHASE == ALL or PHASE == 2:
            if not TOGETHER:
                block = load_block(out, 0, p, True, OUT)
            product(block, out, mixed_ptr, gain, eps, other_ptr, p, OUT, False, HARDWARE)
            arrive(counter_ptr, TOGETHER)
            if TOGETHER:
                block = load_block(up, 0, p, True, UP)
            target += PROGRAMS
            wait(counter_ptr, target, TOGETHER)
        if PHASE == ALL or PHASE == 3:
            if not TOGETHER:
                block = load_block(up, 0, p, True, UP)
            product(block, up, other_ptr, gain, eps, hidden_ptr, p, UP, True, HARDWARE)
            arrive(counter_ptr, TOGETHER)
            if TOGETHER:
                block = load_block(down, 0, p, True, DOWN)
                if more:
                    ask_for_gain(address(table_ptr, layer + 1, 0, dtype), p, D)
            target += PROGRAMS
            wait(counter_ptr, target, TOGETHER)
        if PHASE == ALL or PHASE == 4:
            if not TOGETHER:
                block = load_block(down, 0, p, True, DOWN)
            product(block, down, hidden_ptr, gain, eps, x_ptr, p, DOWN, False, HARDWARE)
            arrive(counter_ptr, TOGETHER)
            target += PROGRAMS
        block = load_block(linear_map(table_ptr, layer + 1, 1, x_ptr, dtype), 0, p, more, QKV)
        if PHASE == ALL or PHASE == 4:
            wait(counter_ptr, target, TOGETHER)
    if PHASE == ALL or PHASE == 5:
        head = head_ptr, head_scale_ptr, head_bias_ptr, x_ptr
        head_block = load_block(head, 0, p, True, HEAD)
        product(head_block, head, x_ptr, final_gain_ptr, eps, logits_ptr, p, HEAD, True, HARDWARE)
    if TOGETHER:  # the last to leave makes ready for the next token
        tl.debug_barrier()
        if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == target + PROGRAMS - 1:
            tl.store(counter_ptr, 0)
