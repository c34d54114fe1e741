"""Endless batches from packed documents, with a position that can be saved and sought."""

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyper.data.packing import Packing, count_sequences
from pyper.data.shards import Documents
from pyper.errors import DataError


@dataclass(frozen=True)
class Batch:
    """Sequences to learn from.

    Attributes:
        tokens: int64 (B, T).
        targets: int64 (B, T), the token after each.
        weights: (B, T) of the losses, or None for all equal.
    """

    tokens: Tensor
    targets: Tensor
    weights: Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on `device`; from pinned memory without waiting for the copy."""
        weights = None if self.weights is None else self.weights.to(device, non_blocking=True)
        return Batch(
            self.tokens.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            weights,
        )

    def split(self, micro_batch_size: int) -> "list[Batch]":
        """Batches of at most `micro_batch_size` sequences, in order; the last may be smaller."""
        return [
            Batch(
                self.tokens[i : i + micro_batch_size],
                self.targets[i : i + micro_batch_size],
                None if self.weights is None else self.weights[i : i + micro_batch_size],
            )
            for i in range(0, len(self.tokens), micro_batch_size)
        ]


@dataclass(frozen=True, order=True)
class LoaderPosition:
    """The first sequence of the next batch: its epoch, and its number in that epoch."""

    epoch: int = 0
    sequence: int = 0


class Loader:
    """Batches without end, the same for any number of `workers`.

    An epoch that ends inside a batch is followed by the first sequences of the next one. The
    threads compute at most `2 * workers` batches ahead; the position is that of the next batch
    handed out, whatever was read ahead.

    Raises DataError when `documents` hold less than one sequence.
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
    ) -> None:
        self._documents, self._seq_len, self._batch_size = documents, seq_len, batch_size
        self._random_seed, self._shuffle = random_seed, shuffle
        self._packings: dict[int, Packing] = {}
        self._lock = threading.Lock()
        self._packing(0)  # fails here, not in a thread
        self.sequences_per_epoch = count_sequences(documents.n_tokens, seq_len)
        self._next = 0  # sequences before the next batch, over all epochs
        self._ahead: deque[Future[Batch]] = deque()
        self._look_ahead = 2 * workers
        self._threads = ThreadPoolExecutor(workers, "pyper-loader") if workers else None
        self._pin = torch.cuda.is_available()

    @property
    def position(self) -> LoaderPosition:
        """Where the next batch starts."""
        return LoaderPosition(*divmod(self._next, self.sequences_per_epoch))

    def next_batch(self) -> Batch:
        """The next `batch_size` sequences. Raises what a thread raised, without moving on."""
        if self._threads is None:
            batch = self._compute(self._next)
        else:
            batch = self._take_ahead(self._threads)
        self._next += self._batch_size
        return batch

    def seek(self, position: LoaderPosition) -> None:
        """Continue at `position`. Raises DataError when no epoch has that sequence."""
        if position.epoch < 0 or not 0 <= position.sequence < self.sequences_per_epoch:
            raise DataError(
                f"there is no sequence {position.sequence:,} in epoch {position.epoch}: an epoch "
                f"has {self.sequences_per_epoch:,}",
                hint="the position belongs to other data or another `seq_len`",
            )
        self._forget_ahead()
        self._next = position.epoch * self.sequences_per_epoch + position.sequence

    def state_dict(self) -> dict[str, int | str | bool]:
        """The position, and what it is a position in; plain JSON."""
        return {
            "epoch": self.position.epoch,
            "sequence": self.position.sequence,
            **self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; the batch size may differ.

        Raises DataError when the data, `seq_len`, the seed or the shuffling differ.
        """
        for key, value in self._identity().items():
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

    def _identity(self) -> dict[str, int | str | bool]:
        return {
            "fingerprint": self._documents.fingerprint,
            "seq_len": self._seq_len,
            "random_seed": self._random_seed,
            "shuffle": self._shuffle,
        }

    def _take_ahead(self, threads: ThreadPoolExecutor) -> Batch:
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

    def _compute(self, start: int) -> Batch:
        """The batch whose first sequence has `start` sequences before it over all epochs."""
        epochs, sequences = np.divmod(
            np.arange(start, start + self._batch_size), self.sequences_per_epoch
        )
        windows = np.concatenate(
            [
                self._packing(int(epoch)).sequences(sequences[epochs == epoch])
                for epoch in np.unique(epochs)
            ]
        )
        tokens = torch.from_numpy(windows[:, :-1].copy())
        targets = torch.from_numpy(windows[:, 1:].copy())
        if self._pin:
            tokens, targets = tokens.pin_memory(), targets.pin_memory()
        return Batch(tokens, targets)

    def _packing(self, epoch: int) -> Packing:
        with self._lock:
            if epoch not in self._packings:
                while len(self._packings) >= 2:  # reading ahead straddles two epochs
                    del self._packings[max(self._packings, key=lambda held: abs(held - epoch))]
                self._packings[epoch] = Packing(
                    self._documents,
                    seq_len=self._seq_len,
                    random_seed=self._random_seed,
                    epoch=epoch,
                    shuffle=self._shuffle,
                )
            return self._packings[epoch]
