"""Token shards, written.

A shard is a raw little-endian file of tokens, `<split>/<domain>-000.tokens`, each document as
`bos` and its tokens; `<split>/<domain>-000.documents.npy` holds int64 (n_documents + 1, 2): where
each document starts, in tokens and in bytes of its text. Where a shard holds tokens that are not
learned from (what a user says in a chat), `<split>/<domain>-000.weights` holds a byte for each
token, 0 or 1. A document is ended by the `bos` of the next one, which therefore has the weight of
the token before it; what is written for `bos` itself does not count.
"""

import os
from array import array
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pyper.data.manifest import ShardEntry, SplitEntry, describe
from pyper.data.sources import Split

BUFFER_BYTES = 1 << 20
"""Of one writer; hundreds of writers at once should be given less each."""


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The smallest type that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class ShardWriter:
    """Writes one split of one domain, a new shard after every `shard_tokens` tokens.

    Raises OSError as the file system does.
    """

    def __init__(
        self,
        folder: Path,
        split: Split,
        domain: str,
        *,
        dtype: str,
        bos_id: int,
        shard_tokens: int,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        self._folder, self._prefix = folder, folder / split / domain
        self._dtype, self._shard_tokens = np.dtype(dtype).newbyteorder("<"), shard_tokens
        self._bos = np.array([bos_id], dtype=self._dtype).tobytes()
        self._buffer, self._buffer_bytes = bytearray(), buffer_bytes
        self._weights = bytearray()
        self._tokens_weighed = 0  # in this shard, on disk or in `_weights`; 0 while all are 1
        self._bounds = array("q", (0, 0))  # (token, byte) pairs: 16 bytes a document
        self._bytes = 0
        self._shards: list[ShardEntry] = []

    def add(
        self,
        tokens: NDArray[np.uint32],
        n_bytes: int,
        weights: NDArray[np.uint8] | None = None,
    ) -> None:
        """Append a document: its tokens (T,) without `bos`, and the UTF-8 bytes of its text.

        weights: (T,), 1 for the tokens to learn from and 0 for the others; None where all are.
        """
        self._buffer += self._bos + tokens.astype(self._dtype).tobytes()
        end, end_bytes = self._bounds[-2:]
        if weights is not None or self._tokens_weighed:
            self._weigh(end, 1 + len(tokens), weights)
        self._bounds.extend((end + 1 + len(tokens), end_bytes + n_bytes))
        if self._bounds[-2] >= self._shard_tokens:
            self._finish_shard()
        elif len(self._buffer) >= self._buffer_bytes:
            self._flush()

    def _weigh(self, end: int, n: int, weights: NDArray[np.uint8] | None) -> None:
        """Weights of a document of `n` tokens, its `bos` first, that starts at `end`."""
        self._weights += b"\1" * (end - self._tokens_weighed)  # of the documents before the first
        self._weights += b"\1" * n if weights is None else b"\1" + weights.tobytes()
        self._tokens_weighed = end + n

    def close(self) -> SplitEntry:
        """Finish the last shard; the entry for the manifest."""
        if len(self._bounds) > 2:
            self._finish_shard()
        return SplitEntry(
            documents=sum(shard.documents for shard in self._shards),
            tokens=sum(shard.tokens for shard in self._shards),
            bytes=self._bytes,
            shards=self._shards,
        )

    def _flush(self, *, sync: bool = False) -> None:
        # Opened each time: hundreds of domains would be more files than a process may hold open.
        _append(self._path("tokens"), self._buffer, sync=sync)
        if self._tokens_weighed:
            _append(self._path("weights"), self._weights, sync=sync)

    def _finish_shard(self) -> None:
        self._flush(sync=True)
        bounds = np.array(self._bounds, dtype="<i8").reshape(-1, 2)
        np.save(self._path("documents.npy"), bounds)
        weights = describe(self._path("weights"), self._folder) if self._tokens_weighed else None
        self._shards.append(
            ShardEntry(
                documents=len(bounds) - 1,
                tokens=int(bounds[-1, 0]),
                tokens_file=describe(self._path("tokens"), self._folder),
                documents_file=describe(self._path("documents.npy"), self._folder),
                weights_file=weights,
            )
        )
        self._bytes += int(bounds[-1, 1])
        self._bounds, self._tokens_weighed = array("q", (0, 0)), 0

    def _path(self, ending: str) -> Path:
        name = f"{self._prefix.name}-{len(self._shards):03d}.{ending}"
        return self._prefix.with_name(name)


def _append(path: Path, buffer: bytearray, *, sync: bool) -> None:
    """Move `buffer` to the end of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as stream:
        stream.write(buffer)
        if sync:
            stream.flush()
            os.fsync(stream.fileno())
    buffer.clear()
