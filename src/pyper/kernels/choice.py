"""Expert choice with its inverse: which tokens each expert took, and who took each token.

Three kernels. Scores become integers of the same order, one row per expert; one program per expert
narrows down its lowest score taken, by counting; then all tokens get their places, in parallel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyper.kernels import launch
from pyper.kernels.launch import block_of

if launch.HAS_TRITON:
    import triton
    import triton.language as tl


@dataclass(frozen=True)
class Choice:
    """Who reads what. Nothing of it has a gradient."""

    token_index: Tensor
    """(E, C) int64: the tokens of each expert, all different; ascending where kernels run."""
    slots: Tensor
    """(N, E) int32, the inverse: the place of a token among an expert's, −1 where not taken."""
    kth_score: Tensor
    """(E,), the lowest score taken."""


def choose(scores: Tensor, capacity: int, padding: Tensor | None = None) -> Choice:
    """Each expert's `capacity` highest of scores (N, E) (arXiv:2202.09368, eq. 1).

    padding: (N,), True where there is no token; taken last of all. NaN counts as highest. Which of
    equal scores are taken is open; kernels take the first.
    """
    scores = scores.detach()
    if padding is not None:
        scores = scores.masked_fill(padding[:, None], -torch.inf)
    if launch.runs_triton(scores) and scores.dtype == torch.float32:
        return Choice(*choose_highest(scores.contiguous(), capacity))
    return choose_torch(scores, capacity)


def choose_torch(scores: Tensor, capacity: int) -> Choice:
    """The twin of `choose`, in plain torch."""
    top = scores.T.topk(capacity, dim=-1, sorted=False)
    return Choice(top.indices, slots_of(top.indices, len(scores)), top.values.amin(dim=-1))


def slots_of(token_index: Tensor, n_tokens: int) -> Tensor:
    """The inverse (N, E) int32 of token_index (E, C) of `n_tokens` tokens; see `Choice.slots`."""
    if launch.runs_triton(token_index):
        return invert(token_index.contiguous(), n_tokens)
    return slots_of_torch(token_index, n_tokens)


def slots_of_torch(token_index: Tensor, n_tokens: int) -> Tensor:
    """The twin of `slots_of`, in plain torch."""
    E, C = token_index.shape
    slots = token_index.new_full((n_tokens, E), -1, dtype=torch.int32)
    places = torch.arange(C, dtype=torch.int32, device=token_index.device).expand(E, C)
    return slots.scatter_(0, token_index.T, places.T)


@torch.library.custom_op("pyper::invert", mutates_args=())
def invert(token_index: Tensor, n_tokens: int) -> Tensor:
    """`slots_of` of a contiguous token_index. Every place is written at most once."""
    E, C = token_index.shape
    slots = token_index.new_full((n_tokens, E), -1, dtype=torch.int32)
    block = block_of(C, 1024)
    _invert[(E, triton.cdiv(C, block))](token_index, slots, C, E=E, BLOCK_C=block, num_warps=4)
    return slots


@invert.register_fake
def _(token_index: Tensor, n_tokens: int) -> Tensor:
    return token_index.new_empty((n_tokens, len(token_index)), dtype=torch.int32)


HELD = 32768
"""Keys that one program keeps in registers; more are read again for every count."""


@torch.library.custom_op("pyper::choose_highest", mutates_args=())
def choose_highest(scores: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """token_index, slots and kth_score of contiguous float32 scores (N, E); see `Choice`."""
    N, E = scores.shape
    token_index = scores.new_empty((E, capacity), dtype=torch.int64)
    slots, kth_score = scores.new_empty((N, E), dtype=torch.int32), scores.new_empty(E)
    block_e = block_of(E, 64)
    chunk = min(4096 // block_e, 1024)  # tokens whose places one program finds
    grid = triton.cdiv(N, chunk), triton.cdiv(E, block_e)
    keys, rest = slots.new_empty((E, grid[0] * chunk)), slots.new_empty(E)
    before = slots.new_empty((E, grid[0], 2))
    tile = {"E": E, "CHUNK": chunk, "BLOCK_E": block_e, "num_warps": 4}

    _write_keys[grid](scores, keys, N, **tile)
    block = max(block_of(N, HELD if N <= HELD else 16384), chunk)
    _find_kth[(E,)](
        *(keys, kth_score, rest, before, keys.shape[1], capacity),
        BLOCK=block,
        STEPS=triton.cdiv(N, block),
        CHUNK=chunk,
        num_warps=min(max(block // 512, 4), 32),
    )
    _place[grid](scores, kth_score, rest, before, token_index, slots, N, capacity, **tile)
    return token_index, slots, kth_score


@choose_highest.register_fake
def _(scores: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    index = scores.new_empty((scores.shape[1], capacity), dtype=torch.int64)
    return index, torch.empty_like(scores, dtype=torch.int32), scores.new_empty(scores.shape[1])


if launch.HAS_TRITON:
    LOWEST = tl.constexpr(-(2**31))  # below the keys of all scores: where there is no token
    HIGHEST = tl.constexpr(2**31 - 1)  # the key of NaN

    @triton.jit
    def _invert(index_ptr, slots_ptr, C, E: tl.constexpr, BLOCK_C: tl.constexpr):
        e = tl.program_id(0)
        c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        n = tl.load(index_ptr + e.to(tl.int64) * C + c, mask=c < C, other=0)
        tl.store(slots_ptr + n * E + e, c, mask=c < C)

    @triton.jit
    def _key(score):
        """An int32 that orders as the float32 score does: both zeros are equal, NaN is highest."""
        bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & HIGHEST)
        return tl.where(score != score, HIGHEST, key)

    @triton.jit
    def _score(key):
        """The score whose key this is."""
        return (key ^ ((key >> 31) & HIGHEST)).to(tl.float32, bitcast=True)

    @triton.jit
    def _write_keys(
        scores_ptr,
        keys_ptr,
        N,
        E: tl.constexpr,
        CHUNK: tl.constexpr,
        BLOCK_E: tl.constexpr,
    ):
        """keys (E, width) of scores (N, E), `LOWEST` beyond the tokens: every chunk is whole."""
        n = (tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)).to(tl.int64)[:, None]
        e = (tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E))[None, :]
        score = tl.load(scores_ptr + n * E + e, mask=(n < N) & (e < E), other=0.0)
        width = tl.num_programs(0).to(tl.int64) * CHUNK
        tl.store(keys_ptr + e * width + n, tl.where(n < N, _key(score), LOWEST), mask=e < E)

    @triton.jit
    def _load_keys(keys_ptr, step, width, BLOCK: tl.constexpr):
        n = step * BLOCK + tl.arange(0, BLOCK)
        return tl.load(keys_ptr + n, mask=n < width, other=LOWEST)

    @triton.jit
    def _count(keys_ptr, held, bound, width, BLOCK: tl.constexpr, STEPS: tl.constexpr):
        """How many of an expert's keys are `bound` or more."""
        total = (held >= bound).to(tl.int32)
        for step in range(1, STEPS):
            total += (_load_keys(keys_ptr, step, width, BLOCK) >= bound).to(tl.int32)
        return tl.sum(total)

    @triton.jit
    def _lowest(keys_ptr, held, bound, width, BLOCK: tl.constexpr, STEPS: tl.constexpr):
        """The lowest of an expert's keys that are `bound` or more."""
        lowest = tl.where(held >= bound, held, HIGHEST)
        for step in range(1, STEPS):
            keys = _load_keys(keys_ptr, step, width, BLOCK)
            lowest = tl.minimum(lowest, tl.where(keys >= bound, keys, HIGHEST))
        return tl.min(lowest)

    @triton.jit
    def _find_kth(
        keys_ptr,
        kth_ptr,
        rest_ptr,
        before_ptr,
        width,
        C,
        BLOCK: tl.constexpr,
        STEPS: tl.constexpr,
        CHUNK: tl.constexpr,
    ):
        """One expert's C-th highest key, and how many of its tokens each chunk of tokens follows.

        before (E, chunks, 2): tokens above the C-th key and tokens equal to it, in earlier chunks;
        rest (E,): how many of the equal ones are taken.
        """
        e = tl.program_id(0).to(tl.int64)
        keys_ptr += e * width
        before_ptr += e * (width // CHUNK) * 2
        held = _load_keys(keys_ptr, 0, width, BLOCK)
        # Invariant: C keys or more are at least `low`, fewer are more than `high`.
        low, high = tl.full((), LOWEST + 1, tl.int64), tl.full((), HIGHEST, tl.int64)
        count = width
        while (low < high) & (count != C):
            middle = low + ((high - low + 1) >> 1)
            found = _count(keys_ptr, held, middle.to(tl.int32), width, BLOCK, STEPS)
            count = tl.where(found >= C, found, count)
            low = tl.where(found >= C, middle, low)
            high = tl.where(found >= C, high, middle - 1)
        kth = _lowest(keys_ptr, held, low.to(tl.int32), width, BLOCK, STEPS)
        tl.store(kth_ptr + e, _score(kth))

        above_before, equal_before = 0, 0
        for step in range(STEPS):
            keys = _load_keys(keys_ptr, step, width, BLOCK)
            keys = tl.reshape(keys, (BLOCK // CHUNK, CHUNK))
            above = tl.sum((keys > kth).to(tl.int32), axis=1)
            equal = tl.sum((keys == kth).to(tl.int32), axis=1)
            chunk = step * (BLOCK // CHUNK) + tl.arange(0, BLOCK // CHUNK)
            at, inside = before_ptr + chunk * 2, chunk < width // CHUNK
            tl.store(at, above_before + tl.cumsum(above) - above, mask=inside)
            tl.store(at + 1, equal_before + tl.cumsum(equal) - equal, mask=inside)
            above_before += tl.sum(above)
            equal_before += tl.sum(equal)
        tl.store(rest_ptr + e, C - above_before)

    @triton.jit
    def _place(
        scores_ptr,
        kth_ptr,
        rest_ptr,
        before_ptr,
        index_ptr,
        slots_ptr,
        N,
        C,
        E: tl.constexpr,
        CHUNK: tl.constexpr,
        BLOCK_E: tl.constexpr,
    ):
        """Places in the order of tokens; of those equal to the C-th score the first `rest`."""
        n = (tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)).to(tl.int64)[:, None]
        e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
        inside = (n < N) & (e < E)[None, :]
        key = _key(tl.load(scores_ptr + n * E + e[None, :], mask=inside, other=0.0))
        kth = _key(tl.load(kth_ptr + e, mask=e < E, other=0.0))[None, :]
        rest = tl.load(rest_ptr + e, mask=e < E, other=0)[None, :]
        above, equal = (key > kth) & inside, (key == kth) & inside

        # Both counts in one scan: a chunk is far shorter than 2^16.
        own = above.to(tl.int32) + (equal.to(tl.int32) << 16)
        earlier = tl.cumsum(own, axis=0) - own
        at = before_ptr + (e.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * 2
        n_above = tl.load(at, mask=e < E, other=0)[None, :] + (earlier & 0xFFFF)
        n_equal = tl.load(at + 1, mask=e < E, other=0)[None, :] + (earlier >> 16)
        taken = above | (equal & (n_equal < rest))
        place = n_above + tl.minimum(n_equal, rest)
        tl.store(slots_ptr + n * E + e[None, :], tl.where(taken, place, -1), mask=inside)
        tl.store(index_ptr + e.to(tl.int64)[None, :] * C + place, n, mask=taken)
