"""The kernels of `paged_attention`: parts of a text's past side by side, then put together."""

import triton
import triton.language as tl

from pyper.kernels.attend_kernel import ask_for_past, attend, join, part_of_past
from pyper.kernels.overlap import wait_for_others


@triton.jit
def attend_part(
    query_ptr,
    key_ptr,
    value_ptr,
    keys_ptr,
    values_ptr,
    pages_ptr,
    positions_ptr,
    part_ptr,
    log_sum_ptr,
    out_ptr,
    tickets_ptr,
    cos_ptr,
    sin_ptr,
    query_gain_ptr,
    key_gain_ptr,
    query_stride,
    key_stride,
    value_stride,
    pages_stride,
    scale,
    eps,
    HAS_TURN: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_TICKETS: tl.constexpr,
    MOST_PARTS: tl.constexpr,
    LEAST_BLOCKS: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    b, h, part = tl.program_id(0), tl.program_id(1) * HEADS, tl.program_id(2)
    n_kv_heads, n_parts = tl.num_programs(1) * HEADS, tl.num_programs(2)
    position = tl.load(positions_ptr + b).to(tl.int32)
    if HAS_TICKETS:  # else all parts are expected
        worth_it = tl.cdiv(tl.cdiv(position, BLOCK_S), LEAST_BLOCKS)
        n_parts = tl.minimum(n_parts, tl.maximum(worth_it, 1))
    if part < n_parts:
        start, past = part_of_past(position, part, n_parts, BLOCK_S)
        pages_ptr += b * pages_stride
        if OVERLAP:
            ask_for_past(
                *(keys_ptr, values_ptr, pages_ptr, start, past, h, n_kv_heads),
                *(K, PAGE, HEADS, BLOCK_S, BLOCK_K),
            )
        wait_for_others(OVERLAP)
        attend(
            *(query_ptr, key_ptr, value_ptr, keys_ptr, values_ptr, pages_ptr, part_ptr),
            *(log_sum_ptr, out_ptr, tickets_ptr, cos_ptr, sin_ptr, query_gain_ptr, key_gain_ptr),
            *(query_stride, key_stride, value_stride, scale, eps, position, start, past),
            *(b, h, part, n_kv_heads, n_parts),
            *(HAS_TURN, HAS_NORM, HAS_TICKETS, MOST_PARTS),
            *(K, GROUPS, PAGE, HEADS, BLOCK_G, BLOCK_S, BLOCK_K, STAGES),
        )


@triton.jit
def join_parts(
    part_ptr,
    log_sum_ptr,
    out_ptr,
    K: tl.constexpr,
    N_PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    wait_for_others(OVERLAP)
    d = tl.arange(0, BLOCK_K)
    join(part_ptr, log_sum_ptr, out_ptr, tl.program_id(0), N_PARTS, d, K, N_PARTS)
