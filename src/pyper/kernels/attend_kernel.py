"""What a program does with a part of a text's past: in `paged_attention`, and in `whole_token`."""

import triton
import triton.language as tl

from pyper.kernels.overlap import ask_ahead

# Below every score, and finite: it can be subtracted from itself.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def _read_heads(
    x_ptr,
    at,
    d,
    inside,
    gain_ptr,
    cos_ptr,
    sin_ptr,
    position,
    eps,
    K: tl.constexpr,
    HAS_TURN: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """Rows (R, BLOCK_K) that begin at `at` (R,), normalised and turned, in float32."""
    # Others may have written them in this very kernel: not from a cache of this processor.
    x = tl.load(x_ptr + at[:, None] + d[None, :], mask=inside, other=0.0, cache_modifier=".cg").to(
        tl.float32
    )
    if HAS_TURN:
        half = (d + K // 2) % K  # the other number of the pair
        pair = tl.load(
            x_ptr + at[:, None] + half[None, :], mask=inside, other=0.0, cache_modifier=".cg"
        ).to(tl.float32)
        if HAS_NORM:
            scale = tl.rsqrt(tl.sum(x * x, axis=1) / K + eps)[:, None]
            x *= scale * tl.load(gain_ptr + d, mask=d < K, other=0.0).to(tl.float32)[None, :]
            gain = tl.load(gain_ptr + half, mask=d < K, other=0.0).to(tl.float32)
            pair *= scale * gain[None, :]
        cos = tl.load(cos_ptr + position * K + d, mask=d < K, other=0.0)
        sin = tl.load(sin_ptr + position * K + d, mask=d < K, other=0.0)
        x = x * cos[None, :] + pair * sin[None, :]
    return x


@triton.jit
def _slots(pages_ptr, s, past, PAGE: tl.constexpr):
    """Where tokens s of a text lie in the cache."""
    page = tl.load(pages_ptr + s // PAGE, mask=s < past, other=0)
    return page * PAGE + s % PAGE


@triton.jit
def part_of_past(position, part, n_parts, BLOCK_S: tl.constexpr):
    """Which tokens before `position` a part reads: from the first, up to the second.

    Parts are whole blocks: one may be empty, and then weighs nothing.
    """
    per_part = tl.cdiv(tl.cdiv(position, BLOCK_S), n_parts) * BLOCK_S
    start = part * per_part
    return start, tl.minimum(start + per_part, position)


@triton.jit
def ask_for_past(
    keys_ptr,
    values_ptr,
    pages_ptr,
    start,
    past,
    h,
    n_kv_heads,
    K: tl.constexpr,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Asks for the first keys and values that a part of heads from h on will attend to."""
    IN_LINE: tl.constexpr = 1024 // keys_ptr.dtype.element_ty.primitive_bitwidth
    s = start + tl.arange(0, BLOCK_S)
    tokens = _slots(pages_ptr, s, past, PAGE)[:, None] * (n_kv_heads * K) + h * K
    lines = tokens + tl.arange(0, max(HEADS * BLOCK_K // IN_LINE, 1))[None, :] * IN_LINE
    ask_ahead(keys_ptr + lines)
    ask_ahead(values_ptr + lines)


@triton.jit
def join(
    part_ptr, log_sum_ptr, out_ptr, row, n_parts, d, K: tl.constexpr, MOST_PARTS: tl.constexpr
):
    """The parts of a query, each by its share of the softmax, in their order.

    There is room for MOST_PARTS of each: how many there are differs from text to text.
    """
    p = tl.arange(0, MOST_PARTS)
    there = p < n_parts
    # Others may have written them: not from a cache of this processor.
    log_sum = tl.load(
        log_sum_ptr + row * MOST_PARTS + p, mask=there, other=float("-inf"), cache_modifier=".cg"
    )
    weights = tl.exp(log_sum - tl.max(log_sum, axis=0))  # the first part is not empty
    weights = weights / tl.sum(weights, axis=0)
    at = (row * MOST_PARTS + p)[:, None] * K + d[None, :]
    inside = there[:, None] & (d < K)[None, :]
    parts = tl.load(part_ptr + at, mask=inside, other=0.0, cache_modifier=".cg")
    mixed = tl.sum(weights[:, None] * parts, axis=0)
    tl.store(out_ptr + row * K + d, mixed, mask=d < K)


@triton.jit
def attend(
    query_ptr,
    key_ptr,
    value_ptr,
    keys_ptr,
    values_ptr,
    pages_ptr,
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
    scale,
    eps,
    position,
    start,
    past,
    b,
    h,
    part,
    n_kv_heads,
    n_parts,
    HAS_TURN: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_TICKETS: tl.constexpr,
    MOST_PARTS: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One part, tokens start … past, of what text b and HEADS heads of keys, from h on, read.

    The queries of all these heads are rows of one product; those of other heads than the block's
    weigh nothing.
    """
    g, d, each = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_S)
    row_width = n_kv_heads * K
    keys_ptr += h * K
    values_ptr += h * K
    first = (b * n_kv_heads + h) * GROUPS
    row = first + g  # of the queries, in (B · H)
    in_query = (g < HEADS * GROUPS)[:, None] & (d < K)[None, :]
    at_query = b * query_stride + (h * GROUPS + g) * K
    query = _read_heads(
        *(query_ptr, at_query, d, in_query, query_gain_ptr, cos_ptr, sin_ptr, position, eps),
        *(K, HAS_TURN, HAS_NORM),
    ).to(keys_ptr.dtype.element_ty)
    # Part 0 begins with the new token, which is not in the cache yet.
    own = g // GROUPS
    new_key = _read_heads(
        *(key_ptr, b * key_stride + (h + own) * K, d, in_query, key_gain_ptr, cos_ptr, sin_ptr),
        *(position, eps, K, HAS_TURN, HAS_NORM),
    ).to(keys_ptr.dtype.element_ty)
    at_value = b * value_stride + (h + own)[:, None] * K + d[None, :]
    new_value = tl.load(value_ptr + at_value, mask=in_query, other=0.0, cache_modifier=".cg")
    if part == 0:
        slot = tl.load(pages_ptr + position // PAGE) * PAGE + position % PAGE
        at = slot * row_width + own[:, None] * K + d[None, :]
        once = in_query & (g % GROUPS == 0)[:, None]
        tl.store(keys_ptr + at, new_key, mask=once)
        tl.store(values_ptr + at, new_value, mask=once)
    score = scale * tl.sum(query.to(tl.float32) * new_key.to(tl.float32), axis=1)
    highest = tl.where(part == 0, score, LOWEST)
    total = tl.where(part == 0, 1.0, tl.zeros((BLOCK_G,), dtype=tl.float32))
    mixed = tl.where(part == 0, new_value.to(tl.float32), 0.0)
    for step in tl.range(0, tl.cdiv(past - start, BLOCK_S) * HEADS, num_stages=STAGES):
        s = start + step // HEADS * BLOCK_S + each
        head = step % HEADS
        at = _slots(pages_ptr, s, past, PAGE)[:, None] * row_width + head * K + d[None, :]
        there = (s < past)[:, None] & (d < K)[None, :]
        key = tl.load(keys_ptr + at, mask=there, other=0.0)
        value = tl.load(values_ptr + at, mask=there, other=0.0)
        scores = scale * tl.dot(query, tl.trans(key), input_precision="ieee")  # (G, S)
        counts = (s < past)[None, :]
        if HEADS > 1:
            counts &= (own == head)[:, None]
        scores = tl.where(counts, scores, float("-inf"))
        now = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp(scores - now[:, None])
        shrink = tl.exp(highest - now)
        mixed = tl.dot(
            weights.to(value.dtype), value, mixed * shrink[:, None], input_precision="ieee"
        )
        total = total * shrink + tl.sum(weights, axis=1)
        highest = now
    nothing = total == 0
    mixed = mixed / tl.where(nothing, 1.0, total)[:, None]
    log_sum = highest + tl.log(tl.where(nothing, 1.0, total))
    log_sum = tl.where(nothing, float("-inf"), log_sum)
    if HAS_TICKETS and n_parts == 1:
        tl.store(out_ptr + row[:, None] * K + d[None, :], mixed, mask=in_query)
    else:
        out = row * MOST_PARTS + part
        tl.store(part_ptr + out[:, None] * K + d[None, :], mixed, mask=in_query)
        tl.store(log_sum_ptr + out, log_sum, mask=g < HEADS * GROUPS)
    if HAS_TICKETS and n_parts > 1:
        tl.debug_barrier()  # all threads have stored their part of the part
        ticket = tickets_ptr + b * n_kv_heads + h
        if tl.atomic_add(ticket, 1, sem="acq_rel") == n_parts - 1:
            tl.debug_barrier()
            for q in tl.static_range(HEADS * GROUPS):
                join(part_ptr, log_sum_ptr, out_ptr, first + q, n_parts, d, K, MOST_PARTS)
            tl.store(ticket, 0)
