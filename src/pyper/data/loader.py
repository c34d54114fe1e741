"""Endless batches from packed documents, with a position that can be saved and sought."""

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyper.data.batch import Batch
from pyper.data.domain_weights import check_domains, epoch_documents
from pyper.data.packing import Packing, count_sequences
from pyper.data.shards import Documents
from pyper.errors import DataError


@dataclass(frozen=True, order=True)
class LoaderPosition:
    """The first sequence of the next batch: its epoch, and its number in that epoch."""

    epoch: int = 0
    sequence: int = 0


class Loader:
    """Batches without end, the same for any number of `workers`.

    An epoch that ends inside a batch is followed by the first sequences of the next one. The
    threads compute at most `2 * workers` batches ahead; the position is that of the next batch
    handed out, whatever was read ahead. Batches in which nothing is learned from (all weights 0, in
    chats) are passed over.

    domain_weights: how often a domain is seen in an epoch (1.0 where it is not named), see
    `epoch_documents`.
    rank, world_size: of several processes that share each batch, every one is handed its own
    `batch_size / world_size` sequences; in the order of ranks they are the batch of a single
    process. Positions are those of the whole, so that another number of processes can go on.

    Raises DataError when `documents` hold less than one sequence, or a batch cannot be shared.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        seq_len: int,
        batch_size: int,
        random_seed: int,
        workers: int = 0,
        shuffle: bool = True,
        domain_weights: Mapping[str, float] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _check_share(batch_size, rank, world_size)
        check_domains(domain_weights or {}, documents)
        self._documents, self._seq_len, self._batch_size = documents, seq_len, batch_size
        self._random_seed, self._shuffle = random_seed, shuffle
        self._domain_weights = dict(sorted((domain_weights or {}).items()))
        share = batch_size // world_size
        self._own = slice(rank * share, (rank + 1) * share)
        self._packings: dict[int, Packing] = {}
        self._lock = threading.Lock()
        self._packing(0)  # fails here, not in a thread
        self._epoch_starts = [0]  # sequences before each epoch, as far as it was asked for
        self._next = 0  # sequences before the next batch, over all epochs
        self._ahead: deque[Future[Batch | None]] = deque()
        self._look_ahead = 2 * workers
        self._threads = ThreadPoolExecutor(workers, "pyper-loader") if workers else None
        self._pin = torch.cuda.is_available()

    @property
    def position(self) -> LoaderPosition:
        """Where the next batch starts."""
        epoch = self._epoch_of(self._next)
        return LoaderPosition(epoch, self._next - self._start_of(epoch))

    def sequences_in(self, epoch: int) -> int:
        """Sequences of an epoch; all have the same number where domains have no weights."""
        return self._start_of(epoch + 1) - self._start_of(epoch)

    def next_batch(self) -> Batch:
        """The next `batch_size` sequences (this rank's of them).

        Raises what a thread raised, without moving on, and DataError where an epoch and more has
        nothing to learn from.
        """
        begin = self._next
        while True:
            if self._threads is None:
                batch = self._compute(self._next)
            else:
                batch = self._take_ahead(self._threads)
            self._next += self._batch_size
            if batch is not None:
                return batch
            if self._next - begin > self.sequences_in(0) + self._batch_size:
                raise DataError(
                    "all weights of a whole epoch are 0: there is nothing to learn from",
                    hint="raise `data.seq_len`, or add chats with answers",
                )

    def seek(self, position: LoaderPosition) -> None:
        """Continue at `position`. Raises DataError when no epoch has that sequence."""
        n = self.sequences_in(position.epoch) if position.epoch >= 0 else 0
        if not 0 <= position.sequence < n:
            raise DataError(
                f"there is no sequence {position.sequence:,} in epoch {position.epoch}: an epoch "
                f"has {n:,}",
                hint="the position belongs to other data or another `seq_len`",
            )
        self._forget_ahead()
        self._next = self._start_of(position.epoch) + position.sequence

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in; plain JSON."""
        return {
            "epoch": self.position.epoch,
            "sequence": self.position.sequence,
            **self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; batch size and number of processes may differ.

        Raises DataError when the data, `seq_len`, the seed, the weights or the shuffling differ.
        """
        now = self._identity()
        for key in dict.fromkeys([*now, "domain_weights"]):
            value = now.get(key)
            if state.get(key) != value:
                raise DataError(
                    f"cannot resume: `{key}` was {state.get(key)!r} and is {value!r} now",
                    hint="resume with the data and settings the run started with, or start anew",
                )
        self.seek(LoaderPosition(int(state["epoch"]), int(state["sequence"])))

    def close(self) -> None:
        """Stop the threads; the loader may not be used afterwards."""
        self._forget_ahead()
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def _identity(self) -> dict[str, Any]:
        weights = {"domain_weights": self._domain_weights} if self._domain_weights else {}
        return {
            "fingerprint": self._documents.fingerprint,
            "seq_len": self._seq_len,
            "random_seed": self._random_seed,
            "shuffle": self._shuffle,
            **weights,
        }

    def _take_ahead(self, threads: ThreadPoolExecutor) -> Batch | None:
        while len(self._ahead) < self._look_ahead:
            start = self._next + len(self._ahead) * self._batch_size
            self._ahead.append(threads.submit(self._compute, start))
        try:
            return self._ahead.popleft().result()
        except BaseException:
            self._forget_ahead()  # else the batches behind would move up a place
            raise

    def _forget_ahead(self) -> None:
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def _compute(self, start: int) -> Batch | None:
        """The batch whose first sequence has `start` sequences before it over all epochs.

        None where no process learns anything from it.
        """
        weights = self._weights(self._parts(start, self._batch_size))
        if weights is not None and not weights.any():
            return None
        own = self._parts(start + self._own.start, self._own.stop - self._own.start)
        windows = np.concatenate([packing.sequences(rows) for packing, rows in own])
        batch = Batch(
            torch.from_numpy(windows[:, :-1].copy()),
            torch.from_numpy(windows[:, 1:].copy()),
            None if weights is None else torch.from_numpy(weights[self._own]),
        )
        return batch.pin_memory() if self._pin else batch

    def _weights(
        self, parts: list[tuple[Packing, NDArray[np.int64]]]
    ) -> NDArray[np.float32] | None:
        """Weights of the whole batch; an epoch of a weighted mixture may have none, others some."""
        found = [packing.weights(rows) for packing, rows in parts]
        if all(own is None for own in found):
            return None
        shapes = [(len(rows), self._seq_len) for _, rows in parts]
        ones = [np.ones(shape, np.uint8) for shape in shapes]
        chosen = [one if own is None else own for own, one in zip(found, ones, strict=True)]
        return np.concatenate(chosen).astype(np.float32)

    def _parts(self, start: int, n: int) -> list[tuple[Packing, NDArray[np.int64]]]:
        """`n` sequences from `start` on: the epochs they are in, and their numbers there."""
        parts, stop = [], start + n
        while start < stop:
            epoch = self._epoch_of(start)
            first = self._start_of(epoch)
            end = min(stop, self._start_of(epoch + 1))
            parts.append((self._packing(epoch), np.arange(start - first, end - first)))
            start = end
        return parts

    def _epoch_of(self, sequence: int) -> int:
        """The epoch of a sequence that is counted over all epochs."""
        while self._epoch_starts[-1] <= sequence:
            self._start_of(len(self._epoch_starts))
        return bisect_right(self._epoch_starts, sequence) - 1

    def _start_of(self, epoch: int) -> int:
        """Sequences before an epoch."""
        with self._lock:
            while len(self._epoch_starts) <= epoch:
                n = count_sequences(self._tokens_in(len(self._epoch_starts) - 1), self._seq_len)
                self._epoch_starts.append(self._epoch_starts[-1] + n)
            return self._epoch_starts[epoch]

    def _tokens_in(self, epoch: int) -> int:
        if not self._domain_weights:
            return self._documents.n_tokens
        return int(self._documents.lengths[self._chosen(epoch)].sum())

    def _chosen(self, epoch: int) -> NDArray[np.int64]:
        return epoch_documents(self._documents, self._domain_weights, self._random_seed, epoch)

    def _packing(self, epoch: int) -> Packing:
        with self._lock:
            if epoch not in self._packings:
                while len(self._packings) >= 2:  # reading ahead straddles two epochs
                    del self._packings[max(self._packings, key=lambda held: abs(held - epoch))]
                documents = self._documents
                if self._domain_weights:
                    documents = documents.select(self._chosen(epoch))
                self._packings[epoch] = Packing(
                    documents,
                    seq_len=self._seq_len,
                    random_seed=self._random_seed,
                    epoch=epoch,
                    shuffle=self._shuffle,
                )
            return self._packings[epoch]


def _check_share(batch_size: int, rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise DataError(
            f"`rank` must be in [0, {world_size}), not {rank}", hint="the first process is 0"
        )
    if batch_size % world_size:
        raise DataError(
            f"{world_size} processes cannot share a batch of {batch_size} sequences",
            hint=f"use e.g. {max(1, batch_size // world_size) * world_size}",
        )
