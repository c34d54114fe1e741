"""One token of each row: temperature, top-k, top-p, min-p and the draw itself, in one kernel.

As torch operations this is two dozen launches and a sort. Here one program reads a row again and
again out of its cache: thresholds are found bit by bit (probabilities above zero are ordered as
their bits are), nothing is sorted, and the draw goes over the entries in their own order.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyper.kernels import launch
from pyper.kernels.launch import block_of

if launch.HAS_TRITON:
    import triton
    import triton.language as tl

_BLOCK = 4096
_WARPS = 16


@dataclass(frozen=True)
class DrawRules:
    """The settings of rows (R), each of them a number a row."""

    table: Tensor
    """(R, 4) float32: temperature, top-k, top-p, min-p. A temperature of 0 takes the likeliest."""
    has_top: bool
    """Whether a row has a top-k or a top-p; infinite and 1 are none."""


def takes(log_probs: Tensor) -> bool:
    """Whether the kernel runs there, on rows that lie in one piece."""
    fits = log_probs.dtype == torch.float32 and log_probs.stride(1) == 1
    return fits and launch.runs_triton(log_probs)


def draw_rows(log_probs: Tensor, rules: DrawRules, uniforms: Tensor) -> Tensor:
    """Tokens (R,) int64 of log_probs (R, V), which need not be normalised; uniforms (R,)."""
    R, V = log_probs.shape
    # Every row's probabilities, relative to its largest.
    scratch = torch.empty(R, V, device=log_probs.device)
    tokens = torch.empty(R, dtype=torch.long, device=log_probs.device)
    _draw_row[(R,)](
        *(log_probs, log_probs.stride(0), rules.table, uniforms, scratch, tokens, V),
        BLOCK=block_of(V, _BLOCK),
        HAS_TOP=rules.has_top,
        num_warps=_WARPS,
    )
    return tokens


if launch.HAS_TRITON:

    @triton.jit
    def _best(x_ptr, V, BLOCK: tl.constexpr):
        """The largest number of a row, and where it stands first."""
        lane = tl.arange(0, BLOCK)
        best = tl.full([BLOCK], -float("inf"), tl.float32)
        where = tl.zeros([BLOCK], tl.int32)
        for start in range(0, V, BLOCK):
            x = tl.load(x_ptr + start + lane, mask=start + lane < V, other=-float("inf"))
            where = tl.where(x > best, start + lane, where)
            best = tl.maximum(best, x)
        largest = tl.max(best, axis=0)
        return largest, tl.min(tl.where(best == largest, where, V), axis=0)

    @triton.jit
    def _spread(x_ptr, q_ptr, largest, temperature, V, BLOCK: tl.constexpr):
        """Probabilities relative to the largest; their sum."""
        lane = tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            there = start + lane < V
            x = tl.load(x_ptr + start + lane, mask=there, other=-float("inf"))
            q = tl.exp((x - largest) / temperature)
            tl.store(q_ptr + start + lane, q, mask=there)
            total += q
        return tl.sum(total, axis=0)

    @triton.jit
    def _above(q_ptr, bits, least, V, BLOCK: tl.constexpr, COUNTS: tl.constexpr):
        """Sum (or number) of the entries whose bits are more than `bits`, and at least `least`."""
        lane = tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            q = tl.load(q_ptr + start + lane, mask=start + lane < V, other=-1.0)
            own = q.to(tl.int32, bitcast=True)
            kept = (own > bits) & (own >= least)
            total += tl.where(kept, 1.0 if COUNTS else q, 0.0)
        return tl.sum(total, axis=0)

    @triton.jit
    def _threshold(q_ptr, limit, least, V, BLOCK: tl.constexpr, COUNTS: tl.constexpr):
        """The smallest bits above which there is less than `limit`."""
        low, high = -1, 0x3F800000  # nothing is above 1
        for _ in range(31):
            middle = (low + high) >> 1
            is_less = _above(q_ptr, middle, least, V, BLOCK, COUNTS) < limit
            is_open = high - low > 1
            high = tl.where(is_open & is_less, middle, high)
            low = tl.where(is_open & ~is_less, middle, low)
        return high

    @triton.jit
    def _place_of(q_ptr, bits, n, V, BLOCK: tl.constexpr):
        """Where the n-th entry with exactly these bits stands; V if there are fewer."""
        lane = tl.arange(0, BLOCK)
        seen, place = 0.0, V
        for start in range(0, V, BLOCK):
            q = tl.load(q_ptr + start + lane, mask=start + lane < V, other=-1.0)
            ties = tl.where(q.to(tl.int32, bitcast=True) == bits, 1.0, 0.0)
            is_it = (ties > 0) & (seen + tl.cumsum(ties, axis=0) >= n)
            place = tl.minimum(place, tl.min(tl.where(is_it, start + lane, V), axis=0))
            seen += tl.sum(ties, axis=0)
        return place

    @triton.jit
    def _kept(q_ptr, at, bits, last, V):
        """Entries above the threshold, those at it up to the place `last`; others are 0."""
        q = tl.load(q_ptr + at, mask=at < V, other=0.0)
        own = q.to(tl.int32, bitcast=True)
        return tl.where((own > bits) | ((own == bits) & (at <= last)), q, 0.0)

    @triton.jit
    def _top(q_ptr, total, top_k, top_p, V, BLOCK: tl.constexpr):
        """Threshold of top-k and top-p, and the last of the entries at it that stays."""
        least = 0
        if top_k < V:
            least = _threshold(q_ptr, top_k, 0, V, BLOCK, True)
            total = _above(q_ptr, least - 1, least, V, BLOCK, False)
        bits, last = least, V
        if top_p < 1:
            limit = top_p * total
            bits = tl.maximum(_threshold(q_ptr, limit, least, V, BLOCK, False), least)
            value = bits.to(tl.float32, bitcast=True)
            room = limit - _above(q_ptr, bits, least, V, BLOCK, False)
            n_ties = _above(q_ptr, bits - 1, least, V, BLOCK, True)
            n_ties -= _above(q_ptr, bits, least, V, BLOCK, True)
            if (n_ties - 1) * value >= room:
                last = _place_of(q_ptr, bits, tl.ceil(room / value), V, BLOCK)
        return bits, last

    @triton.jit
    def _draw_row(
        x_ptr,
        x_stride,
        rules_ptr,
        uniforms_ptr,
        q_ptr,
        token_ptr,
        V,
        BLOCK: tl.constexpr,
        HAS_TOP: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        x_ptr += row * x_stride
        q_ptr += row * V
        temperature = tl.load(rules_ptr + 4 * row)
        largest, token = _best(x_ptr, V, BLOCK)
        if temperature > 0:
            total = _spread(x_ptr, q_ptr, largest, temperature, V, BLOCK)
            tl.debug_barrier()
            bits, last = 0, V
            if HAS_TOP:
                top_k, top_p = tl.load(rules_ptr + 4 * row + 1), tl.load(rules_ptr + 4 * row + 2)
                bits, last = _top(q_ptr, total, top_k, top_p, V, BLOCK)
            least = tl.load(rules_ptr + 4 * row + 3).to(tl.int32, bitcast=True)
            last = tl.where(least > bits, V, last)
            bits = tl.maximum(bits, least)
            lane = tl.arange(0, BLOCK)
            kept = tl.zeros([BLOCK], tl.float32)
            for start in range(0, V, BLOCK):
                kept += _kept(q_ptr, start + lane, bits, last, V)
            goal = tl.load(uniforms_ptr + row) * tl.sum(kept, axis=0)
            # The block in which the sum passes the goal, and what was reached before it.
            reached, before, block = 0.0, 0.0, -1
            for start in range(0, V, BLOCK):
                more = reached + tl.sum(_kept(q_ptr, start + lane, bits, last, V), axis=0)
                is_here = (block < 0) & (more > goal)
                before = tl.where(is_here, reached, before)
                block = tl.where(is_here, start, block)
                reached = more
            # Rounding may leave nothing above the goal: then the likeliest stays.
            if block >= 0:
                own = _kept(q_ptr, block + lane, bits, last, V)
                passed = (before + tl.cumsum(own, axis=0) > goal) & (own > 0)
                place = tl.min(tl.where(passed, block + lane, V), axis=0)
                token = tl.where(place < V, place, token)
        tl.store(token_ptr + row, token.to(tl.int64))
