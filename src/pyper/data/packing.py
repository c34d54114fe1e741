"""Documents to training windows: one endless stream per epoch, cut every `seq_len` tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyper.data.shards import Documents, Tokens
from pyper.errors import DataError

_MANY_PIECES = 64
"""A window of more documents is gathered token by token, which is then faster."""


def count_sequences(n_tokens: int, seq_len: int) -> int:
    """Windows of `seq_len` + 1 tokens, overlapping by one, in a stream of `n_tokens`."""
    return max(0, (n_tokens - 1) // seq_len)


class Packing:
    """The windows of one epoch.

    The documents are put one after the other, shuffled by (`random_seed`, `epoch`), and cut into
    windows of `seq_len` + 1 tokens that overlap by one, so that every token but the first is a
    target exactly once. The windows come in a second shuffled order. The rest that fills no window
    is dropped; which tokens those are changes with the epoch. With `shuffle=False` both orders
    are those of `documents`, for evaluation.

    Raises DataError when there is less text than one window.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        seq_len: int,
        random_seed: int,
        epoch: int = 0,
        shuffle: bool = True,
    ) -> None:
        self.seq_len = seq_len
        self.n_sequences = count_sequences(documents.n_tokens, seq_len)
        if self.n_sequences == 0:
            raise DataError(
                f"{documents.n_documents:,} documents with {documents.n_tokens:,} tokens are too "
                f"little for one sequence of {seq_len:,} tokens",
                hint="add text, or lower `seq_len`",
            )
        self._shards, self._weights = documents.shards, documents.weights
        self._lay_out(documents, random_seed, epoch, shuffle)

    def _lay_out(self, documents: Documents, random_seed: int, epoch: int, shuffle: bool) -> None:
        order = np.arange(documents.n_documents)
        self._windows: NDArray[np.int64] | None = None
        if shuffle:
            order = permutation(documents.n_documents, random_seed, epoch, purpose=0)
            self._windows = permutation(self.n_sequences, random_seed, epoch, purpose=1)
        ends = np.cumsum(documents.lengths[order])
        self._first = ends - documents.lengths[order]  # where each document starts in the stream
        self._shard = documents.shard_index[order]
        # Token t of the stream is at t + shift in its document's shard.
        self._shift = documents.starts[order] - self._first

    def sequence(self, index: int) -> NDArray[np.int64]:
        """Window `index` of the epoch, (seq_len + 1,)."""
        window: NDArray[np.int64] = self.sequences([index])[0]
        return window

    def sequences(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """The windows at `indices`, (B, seq_len + 1). Raises IndexError for one out of range."""
        starts = self._starts(indices)
        out = np.empty((len(starts), self.seq_len + 1), dtype=np.int64)
        for row, start in zip(out, starts, strict=True):
            self._fill(row, start, self._shards)
        return out

    def weights(
        self, indices: Sequence[int] | NDArray[np.integer[Any]]
    ) -> NDArray[np.uint8] | None:
        """Weights (B, seq_len) of the targets of the windows at `indices`: 1 to learn from, or 0.

        None where all documents are learned from. Raises IndexError for a window out of range.
        """
        if self._weights is None:
            return None
        starts = self._starts(indices)
        out = np.empty((len(starts), self.seq_len + 1), dtype=np.uint8)
        for row, start in zip(out, starts, strict=True):
            self._fill(row, start, self._weights)
            # A `bos` ends the document before it: whoever learns its last token learns to stop.
            first, last = self._documents(start, start + len(row))
            ends = self._first[first + 1 : last] - start
            row[ends] = row[ends - 1]
        return out[:, 1:]

    def _starts(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> list[int]:
        """Where each window starts in the stream."""
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < self.n_sequences:
            raise IndexError(f"there are {self.n_sequences:,} sequences")
        if self._windows is not None:
            wanted = self._windows[wanted]
        starts: list[int] = (wanted * self.seq_len).tolist()
        return starts

    def _documents(self, start: int, stop: int) -> tuple[int, int]:
        """The first document of a stretch of the stream, and the one after its last."""
        first = int(self._first.searchsorted(start, side="right")) - 1
        return first, int(self._first.searchsorted(stop, side="left"))

    def _fill(self, row: NDArray[Any], start: int, shards: Sequence[Tokens]) -> None:
        """Write what `shards` hold for the stream's tokens from `start` into `row`."""
        stop = start + len(row)
        first, last = self._documents(start, stop)
        if last - first > _MANY_PIECES:
            self._fill_by_token(row, start, first, last, shards)
            return
        bounds = np.concatenate([[start], self._first[first + 1 : last], [stop]])
        shifts = self._shift[first:last]
        begins, ends = (bounds[:-1] + shifts).tolist(), (bounds[1:] + shifts).tolist()
        pieces = zip(self._shard[first:last].tolist(), begins, ends, strict=True)
        np.concatenate([shards[shard][a:b] for shard, a, b in pieces], out=row)

    def _fill_by_token(
        self, row: NDArray[Any], start: int, first: int, last: int, shards: Sequence[Tokens]
    ) -> None:
        """The same for many short documents: one look-up for each shard, not each document."""
        bounds = np.concatenate([[start], self._first[first + 1 : last], [start + len(row)]])
        piece = np.repeat(np.arange(first, last), np.diff(bounds))  # document of each token
        source = np.arange(start, start + len(row)) + self._shift[piece]
        shard = self._shard[piece]
        for number in np.unique(self._shard[first:last]):
            here = shard == number
            row[here] = shards[number][source[here]]


def permutation(n: int, random_seed: int, epoch: int, *, purpose: int) -> NDArray[np.int64]:
    """A shuffled order of n things that only depends on the arguments.

    The order of raw Philox numbers, not `Generator.permutation`: NumPy keeps the former the same
    from release to release, and a resumed run must see the same batches.
    """
    key = np.array([random_seed % 2**64, epoch * 2 + purpose], dtype=np.uint64)
    order: NDArray[np.int64] = np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")
    return order


def fixed_permutation(n: int, random_seed: int, number: int) -> NDArray[np.int64]:
    """A shuffled order of n things, another one for each `number`, that no epoch changes."""
    # Counted from the end: no epoch has these keys.
    return permutation(n, random_seed, 0, purpose=2**64 - 1 - number)
