"""Questions about continuations, in batches in which a common context is read once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyper.nn import PAGE_TOKENS, Chunk


@dataclass(frozen=True)
class Ask:
    """How likely is `continuation` after `context`? Token ids, at least one in each."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def read(self) -> tuple[int, ...]:
        """What the experts read; their predictions end with the continuation's last token."""
        return self.context + self.continuation[:-1]

    @property
    def asked(self) -> slice:
        """The predictions that matter."""
        return slice(len(self.context) - 1, len(self.read))


@dataclass(frozen=True)
class _Family:
    """Questions with one context, of which the whole pages are read once."""

    asks: list[Ask]
    places: list[int]
    """Among all questions."""

    @property
    def n_shared(self) -> int:
        """Tokens that are read once; one of the context is left, to read the rest from."""
        if len(self.asks) == 1:
            return 0
        return (len(self.asks[0].context) - 1) // PAGE_TOKENS * PAGE_TOKENS

    @property
    def n_slots(self) -> int:
        """Tokens whose keys and values have room, in whole pages; at least those that are read."""
        own = (len(ask.read) - self.n_shared for ask in self.asks)
        return self.n_shared + sum(-(-n // PAGE_TOKENS) * PAGE_TOKENS for n in own)

    @property
    def longest(self) -> int:
        """Tokens of the longest question."""
        return max(len(ask.read) for ask in self.asks)


@dataclass(frozen=True)
class _Row:
    """One question, and where the part that it shares with others is read."""

    ask: Ask
    place: int
    pages: Sequence[int]
    held: range
    """Of the tokens that are read, its first ones."""

    @property
    def own(self) -> tuple[int, ...]:
        """Tokens that are read for it alone."""
        return self.ask.read[len(self.held) :]


class Batch:
    """What is read together: the common beginnings first, then what follows each of them.

    B questions, N tokens that are read, T predictions of the longest question.
    """

    def __init__(self, families: Sequence[_Family]) -> None:
        self.n_pages = 0
        self._stems: list[tuple[Chunk, Ask]] = []
        rows = [row for family in families for row in self._rows_of(family)]
        # Equal lengths share one attention.
        self._rows = sorted(rows, key=lambda row: len(row.own))
        self._chunks = [self._chunk_of(row) for row in self._rows]

    def _rows_of(self, family: _Family) -> list[_Row]:
        first = sum(chunk.n_new for chunk, _ in self._stems)
        pages, held = self._take(family.n_shared), range(first, first + family.n_shared)
        if held:
            self._stems.append((Chunk(pages, 0, len(held)), family.asks[0]))
        return [
            _Row(ask, place, pages, held)
            for ask, place in zip(family.asks, family.places, strict=True)
        ]

    def _chunk_of(self, row: _Row) -> Chunk:
        return Chunk([*row.pages, *self._take(len(row.own))], len(row.held), len(row.own))

    def _take(self, n_tokens: int) -> range:
        """New pages; page 0 belongs to nobody."""
        first = self.n_pages + 1
        self.n_pages += -(-n_tokens // PAGE_TOKENS)
        return range(first, self.n_pages + 1)

    @property
    def asks(self) -> list[Ask]:
        """The questions (B)."""
        return [row.ask for row in self._rows]

    @property
    def places(self) -> list[int]:
        """Of the questions among all of them."""
        return [row.place for row in self._rows]

    @cached_property
    def passes(self) -> list[tuple[Tensor, list[Chunk]]]:
        """Tokens, N in all, and where they belong; one pass after another."""
        stems = [ask.read[: chunk.n_new] for chunk, ask in self._stems]
        passes = [
            (stems, [chunk for chunk, _ in self._stems]),
            ([row.own for row in self._rows], self._chunks),
        ]
        return [(_flat(tokens), chunks) for tokens, chunks in passes if chunks]

    @cached_property
    def targets(self) -> Tensor:
        """(N,), the token that comes after each that is read."""
        stems = [ask.read[1 : chunk.n_new + 1] for chunk, ask in self._stems]
        rests = [(*row.own[1:], row.ask.continuation[-1]) for row in self._rows]
        return _flat([*stems, *rests])

    @cached_property
    def index(self) -> Tensor:
        """(B, T), where among the N a question's tokens are; 0 where it has ended."""
        at = sum(chunk.n_new for chunk, _ in self._stems)
        rows = []
        for row in self._rows:
            rows.append([*row.held, *range(at, at + len(row.own))])
            at += len(row.own)
        return _padded(rows)

    @property
    def asked(self) -> Tensor:
        """(B, T), True where a token of a continuation is predicted."""
        asked = torch.zeros(self.index.shape, dtype=torch.bool)
        for row, ask in enumerate(self.asks):
            asked[row, ask.asked] = True
        return asked

    @property
    def tokens(self) -> Tensor:
        """(B, T + 1), the whole texts, padded on the right."""
        return _padded([(*ask.read, ask.continuation[-1]) for ask in self.asks])


def batches_of(asks: Sequence[Ask], batch_tokens: int) -> Iterator[Batch]:
    """Batches of `batch_tokens` tokens or one question, long ones first: what does not fit the
    memory is found at once."""
    batch: list[_Family] = []
    for family in _families(asks, batch_tokens):
        if batch and sum(f.n_slots for f in batch) + family.n_slots > batch_tokens:
            yield Batch(batch)
            batch = []
        batch.append(family)
    if batch:
        yield Batch(batch)


def _families(asks: Sequence[Ask], batch_tokens: int) -> list[_Family]:
    """By context, longest first; one that is larger than a batch is divided."""
    by_context: dict[tuple[int, ...], list[int]] = {}
    for place, ask in enumerate(asks):
        by_context.setdefault(ask.context, []).append(place)
    families = []
    for places in by_context.values():
        whole = _Family([asks[place] for place in places], places)
        step = len(places) if whole.n_slots <= batch_tokens else batch_tokens // whole.longest
        for start in range(0, len(places), max(1, step)):
            part = places[start : start + max(1, step)]
            families.append(_Family([asks[place] for place in part], part))
    return sorted(families, key=lambda family: -family.longest)


def _flat(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([token for row in rows for token in row], dtype=torch.long)


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
