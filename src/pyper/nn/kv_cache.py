"""Keys and values of the tokens that were read: pages of a fixed pool, and who reads which."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from pyper.config import ExpertConfig

PAGE_TOKENS = 16
"""Tokens of a page; attention reads whole pages."""
ROW_TILE = 8
"""Rows of a product, and queries of an attention, come in multiples of this.

Then a row's result does not depend, to the last bit, on how many others there are and where it
stands: measured for PyTorch's matrix products and attention on CPUs (MKL, oneDNN), where one to
three rows take other ways. `tests/generate/test_batch_invariance.py` checks it."""
# Likewise the width of a head: rows of odd widths begin at odd addresses, and take other ways.
_HEAD_TILE = 8


@dataclass
class KVStore:
    """Keys and values (n_layers, n_slots, kv_heads, K) of all pages, one slot a token.

    Page 0 belongs to nobody: padding is written there.
    """

    keys: Tensor
    values: Tensor
    chosen: Tensor | None = None
    """(E, n_slots), `token_mixture` only: which tokens each expert reads."""

    @classmethod
    def allocate(
        cls, config: ExpertConfig, n_pages: int, *, device: torch.device, dtype: torch.dtype
    ) -> "KVStore":
        """Room for `n_pages` pages beside page 0."""
        n_slots = (n_pages + 1) * PAGE_TOKENS
        # Attentions that are mixed count as layers: those of one layer stand together.
        n_layers = config.n_layers * max(config.attention_experts, 1)
        n_experts = config.routing.n_experts
        chosen = None
        if config.kind == "token_mixture":  # the stem, then every layer of every expert
            stem = config.routing.stem_layers
            n_layers = stem + n_experts * (n_layers - stem)
            chosen = torch.zeros(n_experts, n_slots, dtype=torch.bool, device=device)
        shape = (n_layers, n_slots, config.kv_heads, config.dim_per_head)
        # Zeros: what is masked has weight 0, and 0 · NaN would still be NaN.
        return cls(
            keys=torch.zeros(shape, device=device, dtype=dtype),
            values=torch.zeros(shape, device=device, dtype=dtype),
            chosen=chosen,
        )


@dataclass(frozen=True)
class Chunk:
    """New tokens of one text, to be read after those in its pages."""

    pages: Sequence[int]
    """All of the text's pages, in order, with room for the new tokens."""
    start: int
    """Tokens before the new ones."""
    n_new: int
    n_held: int = 0
    """The first so many of the new tokens are in the pages already and are not written again."""


@dataclass(frozen=True)
class Group:
    """Rows (B) with T new tokens each, side by side in the flat batch."""

    flat: slice
    """Of the B·T tokens."""
    n_rows: int
    slots: Tensor
    """(B, S), what the rows read."""
    last: Tensor
    """(B, T'), the last that each query may look at; T' is T rounded up to `ROW_TILE`."""
    mask: Tensor
    """(B, 1, T', S), True where a query may look."""


@dataclass(frozen=True)
class CachePass:
    """What one forward pass over a flat batch (N tokens of any texts) writes and reads."""

    store: KVStore
    positions: Tensor
    """(N,), of each token in its text."""
    slots: Tensor
    """(N,), where its keys and values go."""
    groups: list[Group]
    padding: Tensor | None = None
    """(1, N), True where there is no token; None: tokens everywhere."""

    @classmethod
    def plan(cls, store: KVStore, chunks: Sequence[Chunk]) -> "CachePass":
        """A pass over the new tokens of the chunks, one after another, filled up to whole tiles."""
        device = store.keys.device
        positions = [c.start + i for c in chunks for i in range(c.n_new)]
        slots = [slot for c in chunks for slot in _new_slots(c)]
        fill = -len(positions) % ROW_TILE
        padding = torch.arange(len(positions) + fill) >= len(positions)
        groups, at = [], 0
        for n_new, members in groupby(chunks, key=lambda c: c.n_new):
            rows = list(members)
            groups.append(_group(rows, slice(at, at + n_new * len(rows)), device))
            at += n_new * len(rows)
        return cls(
            store,
            torch.tensor(positions + [0] * fill).to(device),
            torch.tensor(slots + [0] * fill).to(device),
            groups,
            padding[None].to(device),
        )

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, expert: int | None = None
    ) -> Tensor:
        """Store keys and values (1, kv_heads, N, K) of one layer; what queries (1, H, N, K) read.

        expert: of a `token_mixture`, which sees only the tokens it has chosen, and the query's own.
        """
        keys, values = self.store.keys[layer], self.store.values[layer]
        keys.index_copy_(0, self.slots, key[0].transpose(0, 1))
        values.index_copy_(0, self.slots, value[0].transpose(0, 1))
        out = torch.zeros_like(query)
        for group in self.groups:
            mask = group.mask if expert is None else self._visible(group, expert)
            rows = rearrange(query[0, :, group.flat], "h (b t) k -> b h t k", b=group.n_rows)
            mixed = _attend(rows, keys[group.slots], values[group.slots], mask)
            out[0, :, group.flat] = rearrange(mixed, "b h t k -> h (b t) k")
        return out

    def write_chosen(self, chosen: Tensor) -> None:
        """Store which experts read the tokens, chosen (N, E)."""
        assert self.store.chosen is not None
        self.store.chosen[:, self.slots] = chosen.T

    def _visible(self, group: Group, expert: int) -> Tensor:
        assert self.store.chosen is not None
        seen = self.store.chosen[expert][group.slots][:, None, None]  # (B, 1, 1, S)
        # A token that was not chosen attends to itself, so that its row is not empty; its output
        # is dropped, and nobody else sees it.
        keys = torch.arange(group.slots.shape[1], device=seen.device)
        return group.mask & (seen | (keys == group.last[:, None, :, None]))


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """query (B, H, T, K), keys and values (B, S, kv_heads, K); (B, H, T, K)."""
    n_new, K = query.shape[2:]
    fill = -K % _HEAD_TILE
    query = _pad(query, (0, fill, 0, mask.shape[2] - n_new))
    key, value = (_pad(x, (0, fill)).transpose(1, 2) for x in (keys, values))
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=grouped, scale=K**-0.5
    )
    return out[:, :, :n_new, :K]


def _pad(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    return F.pad(x, sizes) if any(sizes) else x  # `F.pad` copies even then


def slots_of(pages: Sequence[int], positions: Iterable[int]) -> list[int]:
    """Where tokens at these positions of a text lie, whose pages these are, in order."""
    return [pages[i // PAGE_TOKENS] * PAGE_TOKENS + i % PAGE_TOKENS for i in positions]


def _new_slots(chunk: Chunk) -> list[int]:
    """Of the new tokens; page 0 for those that are held already."""
    slots = slots_of(chunk.pages, range(chunk.start, chunk.start + chunk.n_new))
    return [0] * chunk.n_held + slots[chunk.n_held :]


def _group(chunks: Sequence[Chunk], flat: slice, device: torch.device) -> Group:
    n_new = chunks[0].n_new
    n_pages = max(-(-(c.start + n_new) // PAGE_TOKENS) for c in chunks)
    pages = torch.zeros(len(chunks), n_pages, dtype=torch.long)
    for row, chunk in enumerate(chunks):
        used = chunk.pages[:n_pages]
        pages[row, : len(used)] = torch.tensor(used)
    slots = (pages[..., None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)).flatten(1)
    starts = torch.tensor([c.start for c in chunks])
    last = starts[:, None] + torch.arange(n_new + -n_new % ROW_TILE)
    mask = torch.arange(slots.shape[1]) <= last[..., None]
    return Group(flat, len(chunks), slots.to(device), last.to(device), mask[:, None].to(device))


@dataclass
class KVCache:
    """Rows with pages of their own, for a batch that begins and ends together."""

    store: KVStore
    pages: list[range]
    """Of each row (B)."""
    lengths: Tensor
    """(B,) on the CPU, tokens that each row holds."""
    capacity: int
    """The most tokens that a row can hold."""

    @classmethod
    def allocate(
        cls,
        config: ExpertConfig,
        batch: int,
        capacity: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> "KVCache":
        """Room for `capacity` tokens in each of `batch` rows."""
        n = -(-capacity // PAGE_TOKENS)
        store = KVStore.allocate(config, batch * n, device=device, dtype=dtype)
        pages = [range(1 + row * n, 1 + (row + 1) * n) for row in range(batch)]
        return cls(store, pages, torch.zeros(batch, dtype=torch.long), capacity)

    def select_rows(self, rows: Tensor) -> "KVCache":
        """Some of the rows; they keep their pages."""
        pages = [self.pages[row] for row in rows.tolist()]
        return KVCache(self.store, pages, self.lengths[rows], self.capacity)

    def update_rows(self, rows: Tensor, part: "KVCache") -> None:
        """Take over the lengths of what `select_rows` took out."""
        self.lengths[rows] = part.lengths

    def plan(self, n_new: Tensor) -> CachePass:
        """A pass over `n_new` (B,) more tokens in each row; it is for the caller to count them."""
        return CachePass.plan(
            self.store,
            [
                Chunk(pages, start, new)
                for pages, start, new in zip(
                    self.pages, self.lengths.tolist(), n_new.tolist(), strict=True
                )
                if new
            ],
        )
