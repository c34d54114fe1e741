"""The kernels of `heads`: norm and rotation of each head, and their gradient."""

import triton
import triton.language as tl


@triton.jit
def _turned_heads(
    product_ptr,
    gains_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    n_rows,
    N,
    P,
    eps,
    W: tl.constexpr,
    H: tl.constexpr,
    TURNED: tl.constexpr,
    HALF: tl.constexpr,
    HAS_GAINS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # A row is one head of one token; 2³¹ of them would not fit any memory.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    inside = (row < n_rows)[:, None] & (k < HALF)[None, :]
    n, h = row // TURNED, row % TURNED
    left = (n.to(tl.int64) * W + h * (2 * HALF))[:, None] + k[None, :]
    a = tl.load(product_ptr + left, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(product_ptr + left + HALF, mask=inside, other=0.0).to(tl.float32)
    if HAS_GAINS:
        scale = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / (2 * HALF) + eps)[:, None]
        at = ((n // N * 2 + (h >= H).to(tl.int32)) * (2 * HALF))[:, None] + k[None, :]
        a *= scale * tl.load(gains_ptr + at, mask=inside, other=0.0).to(tl.float32)
        b *= scale * tl.load(gains_ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)
    at = (n % P * (2 * HALF) + HALF)[:, None] + k[None, :]
    cos = tl.load(cos_ptr + at, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + at, mask=inside, other=0.0)
    to = out_ptr + (row.to(tl.int64) * (2 * HALF))[:, None] + k[None, :]
    tl.store(to, a * cos - b * sin, mask=inside)
    tl.store(to + HALF, b * cos + a * sin, mask=inside)


@triton.jit
def _heads_gradient(
    query_ptr,
    query_b,
    query_h,
    query_t,
    key_ptr,
    key_b,
    key_h,
    key_t,
    value_ptr,
    value_b,
    value_h,
    value_t,
    product_ptr,
    gains_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    parts_ptr,
    n_rows,
    T,
    P,
    eps,
    H: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HAS_GAINS: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    part, expert = tl.program_id(0), tl.program_id(1)
    k = tl.arange(0, BLOCK_K)
    heads: tl.constexpr = H + 2 * KV_HEADS
    if HAS_GAINS:  # added up over rows at the end only
        total_query_a = tl.zeros((ROWS, BLOCK_K), dtype=tl.float32)
        total_query_b = tl.zeros((ROWS, BLOCK_K), dtype=tl.float32)
        total_key_a = tl.zeros((ROWS, BLOCK_K), dtype=tl.float32)
        total_key_b = tl.zeros((ROWS, BLOCK_K), dtype=tl.float32)
    for block in range(part * ROWS, n_rows, PARTS * ROWS):
        # 1. which head of which token; the gradient of what was turned, from one of three
        within = block + tl.arange(0, ROWS)
        row = expert * n_rows + within
        n, h = row // heads, row % heads
        inside = (within < n_rows)[:, None] & (k < HALF)[None, :]
        b, t = (n // T).to(tl.int64), (n % T).to(tl.int64)
        is_query = (h < H)[:, None]
        is_value = (h >= H + KV_HEADS)[:, None]
        is_key = (is_query == 0) & (is_value == 0)
        at = (b * query_b + t * query_t + h * query_h)[:, None] + k[None, :]
        ga = tl.load(query_ptr + at, mask=inside & is_query, other=0.0).to(tl.float32)
        gb = tl.load(query_ptr + at + HALF, mask=inside & is_query, other=0.0).to(tl.float32)
        at = (b * key_b + t * key_t + (h - H) * key_h)[:, None] + k[None, :]
        ga += tl.load(key_ptr + at, mask=inside & is_key, other=0.0).to(tl.float32)
        gb += tl.load(key_ptr + at + HALF, mask=inside & is_key, other=0.0).to(tl.float32)
        at = (b * value_b + t * value_t + (h - H - KV_HEADS) * value_h)[:, None] + k[None, :]
        ga += tl.load(value_ptr + at, mask=inside & is_value, other=0.0).to(tl.float32)
        gb += tl.load(value_ptr + at + HALF, mask=inside & is_value, other=0.0).to(tl.float32)

        # 2. turned back; values by the angle 0
        turns = inside & (is_value == 0)
        at = (n % P * (2 * HALF) + HALF)[:, None] + k[None, :]
        cos = tl.load(cos_ptr + at, mask=turns, other=1.0)
        sin = tl.load(sin_ptr + at, mask=turns, other=0.0)
        da, db = ga * cos + gb * sin, gb * cos - ga * sin

        # 3. the norm's gradient, but for values
        to = (row.to(tl.int64) * (2 * HALF))[:, None] + k[None, :]
        if HAS_GAINS:
            xa = tl.load(product_ptr + to, mask=turns, other=0.0).to(tl.float32)
            xb = tl.load(product_ptr + to + HALF, mask=turns, other=0.0).to(tl.float32)
            scale = tl.rsqrt(tl.sum(xa * xa + xb * xb, axis=1) / (2 * HALF) + eps)[:, None]
            xa *= scale
            xb *= scale
            ya, yb = da * xa, db * xb  # of values 0
            total_query_a += tl.where(is_query, ya, 0.0)
            total_query_b += tl.where(is_query, yb, 0.0)
            total_key_a += tl.where(is_query, 0.0, ya)
            total_key_b += tl.where(is_query, 0.0, yb)
            at = ((expert * 2 + (h >= H).to(tl.int32)) * (2 * HALF))[:, None] + k[None, :]
            gain_a = tl.load(gains_ptr + at, mask=turns, other=0.0).to(tl.float32)
            gain_b = tl.load(gains_ptr + at + HALF, mask=turns, other=0.0).to(tl.float32)
            along = tl.sum(ya * gain_a + yb * gain_b, axis=1)[:, None] / (2 * HALF)
            da = tl.where(is_value, da, (da * gain_a - xa * along) * scale)
            db = tl.where(is_value, db, (db * gain_b - xb * along) * scale)
        tl.store(out_ptr + to, da, mask=inside)
        tl.store(out_ptr + to + HALF, db, mask=inside)
    if HAS_GAINS:
        to = parts_ptr + (expert * PARTS + part).to(tl.int64) * (4 * HALF) + k
        tl.store(to, tl.sum(total_query_a, axis=0), mask=k < HALF)
        tl.store(to + HALF, tl.sum(total_query_b, axis=0), mask=k < HALF)
        tl.store(to + 2 * HALF, tl.sum(total_key_a, axis=0), mask=k < HALF)
        tl.store(to + 3 * HALF, tl.sum(total_key_b, axis=0), mask=k < HALF)
