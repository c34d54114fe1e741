"""Token shards: written once, then read through memory maps.

A shard is a raw little-endian file of tokens, `<split>/<domain>-000.tokens`, each document as
`bos` and its tokens; `<split>/<domain>-000.documents.npy` holds int64 (n_documents + 1, 2): where
each document starts, in tokens and in bytes of its text.
"""

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pyper.data.manifest import (
    TOKENIZER,
    DataManifest,
    ShardEntry,
    SplitEntry,
    check_file,
    describe,
    read_manifest,
)
from pyper.data.sources import SPLITS, Split
from pyper.data.tokenizer import TextTokenizer
from pyper.errors import DataError

Tokens = NDArray[np.unsignedinteger[Any]]

_BUFFER_BYTES = 1 << 20


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The smallest type that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class ShardWriter:
    """Writes one split of one domain, a new shard after every `shard_tokens` tokens.

    Raises OSError as the file system does.
    """

    def __init__(
        self, folder: Path, split: Split, domain: str, *, dtype: str, bos_id: int, shard_tokens: int
    ) -> None:
        self._folder, self._prefix = folder, folder / split / domain
        self._dtype, self._shard_tokens = np.dtype(dtype).newbyteorder("<"), shard_tokens
        self._bos = np.array([bos_id], dtype=self._dtype).tobytes()
        self._buffer = bytearray()
        self._bounds = [(0, 0)]
        self._bytes = 0
        self._shards: list[ShardEntry] = []

    def add(self, tokens: NDArray[np.uint32], n_bytes: int) -> None:
        """Append a document: its tokens (T,) without `bos`, and the UTF-8 bytes of its text."""
        self._buffer += self._bos + tokens.astype(self._dtype).tobytes()
        end, end_bytes = self._bounds[-1]
        self._bounds.append((end + 1 + len(tokens), end_bytes + n_bytes))
        if self._bounds[-1][0] >= self._shard_tokens:
            self._finish_shard()
        elif len(self._buffer) >= _BUFFER_BYTES:
            self._flush()

    def close(self) -> SplitEntry:
        """Finish the last shard; the entry for the manifest."""
        if len(self._bounds) > 1:
            self._finish_shard()
        return SplitEntry(
            documents=sum(shard.documents for shard in self._shards),
            tokens=sum(shard.tokens for shard in self._shards),
            bytes=self._bytes,
            shards=self._shards,
        )

    def _flush(self, *, sync: bool = False) -> None:
        # Opened each time: hundreds of domains would be more files than a process may hold open.
        path = self._path("tokens")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as stream:
            stream.write(self._buffer)
            if sync:
                stream.flush()
                os.fsync(stream.fileno())
        self._buffer.clear()

    def _finish_shard(self) -> None:
        self._flush(sync=True)
        np.save(self._path("documents.npy"), np.array(self._bounds, dtype="<i8"))
        self._shards.append(
            ShardEntry(
                documents=len(self._bounds) - 1,
                tokens=self._bounds[-1][0],
                tokens_file=describe(self._path("tokens"), self._folder),
                documents_file=describe(self._path("documents.npy"), self._folder),
            )
        )
        self._bytes += self._bounds[-1][1]
        self._bounds = [(0, 0)]

    def _path(self, ending: str) -> Path:
        name = f"{self._prefix.name}-{len(self._shards):03d}.{ending}"
        return self._prefix.with_name(name)


class TokenData:
    """A data folder written by `prepare`."""

    def __init__(self, path: Path, manifest: DataManifest) -> None:
        self.path = path
        self.manifest = manifest
        self.domains = sorted(manifest.domains)

    @classmethod
    def open(cls, path: Path, verify: bool = False) -> "TokenData":
        """Open a folder and compare the size of every file, with `verify` also every hash.

        Raises DataError when it is no data folder, half written, or a file differs.
        """
        manifest = read_manifest(path)
        for entry in manifest.files():
            check_file(entry, path, verify=verify)
        return cls(path, manifest)

    def tokenizer(self) -> TextTokenizer:
        """The tokenizer of these tokens. Raises TokenizerError when it was exchanged."""
        return TextTokenizer.load(self.path / TOKENIZER)

    def documents(self, split: Split, domains: Sequence[str] | None = None) -> "Documents":
        """The documents of a split, by domain in the order of `self.domains`.

        Raises DataError for an unknown split or domain.
        """
        wanted = self.domains if domains is None else list(domains)
        self._check(split, wanted)
        chosen = [name for name in self.domains if name in wanted]
        shards = [
            (self.domains.index(name), shard)
            for name in chosen
            for shard in self.manifest.domains[name].get(split, SplitEntry()).shards
        ]
        key = "\0".join([self.manifest.fingerprint, split, *chosen])
        return _open_documents(self, shards, hashlib.sha256(key.encode()).hexdigest())

    def _check(self, split: str, domains: Sequence[str]) -> None:
        if split not in SPLITS:
            raise DataError(f"there is no split `{split}`", hint=f"use one of {', '.join(SPLITS)}")
        for name in domains:
            if name not in self.manifest.domains:
                raise DataError(
                    f"there is no domain `{name}` in {self.path}",
                    hint=f"its domains are {', '.join(self.domains)}",
                )


class Documents:
    """Documents in memory-mapped shards, in a fixed order; a view with `select` costs no tokens.

    Attributes:
        lengths: int64 (n,), tokens of each document, its `bos` included.
        n_bytes: int64 (n,), UTF-8 bytes of each document's text.
        domain_index: int16 (n,), index into `domains`.
        domains: names of all domains of the data folder.
        fingerprint: equal for the same documents in the same order.
    """

    def __init__(
        self,
        shards: Sequence[Tokens],
        *,
        shard_index: NDArray[np.int32],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        n_bytes: NDArray[np.int64],
        domain_index: NDArray[np.int16],
        domains: Sequence[str],
        fingerprint: str,
        bos_id: int,
    ) -> None:
        self.shards = shards
        self.shard_index, self.starts = shard_index, starts
        self.lengths, self.n_bytes = lengths, n_bytes
        self.domain_index, self.domains = domain_index, list(domains)
        self.fingerprint, self.bos_id = fingerprint, bos_id

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def n_documents(self) -> int:
        return len(self.lengths)

    @cached_property
    def n_tokens(self) -> int:
        return int(self.lengths.sum())

    def tokens(self, document: int) -> Tokens:
        """All tokens (T,) of a document, `bos` first; read-only, uint16 or uint32."""
        return self.read(document, 0, int(self.lengths[document]))

    def read(self, document: int, start: int, stop: int) -> Tokens:
        """Tokens [start, stop) of a document; fewer where it ends before."""
        first = int(self.starts[document])
        stop = min(stop, int(self.lengths[document]))
        tokens: Tokens = self.shards[self.shard_index[document]][first + start : first + stop]
        return tokens

    def select(self, indices: NDArray[np.integer[Any]]) -> "Documents":
        """The documents at `indices` (n,), in that order. Raises DataError for one out of range."""
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise DataError(f"document index out of range: there are {len(self):,} documents")
        key = self.fingerprint.encode() + indices.astype("<i8").tobytes()
        return Documents(
            self.shards,
            shard_index=self.shard_index[indices],
            starts=self.starts[indices],
            lengths=self.lengths[indices],
            n_bytes=self.n_bytes[indices],
            domain_index=self.domain_index[indices],
            domains=self.domains,
            fingerprint=hashlib.sha256(key).hexdigest(),
            bos_id=self.bos_id,
        )


def _open_documents(
    data: TokenData, shards: Sequence[tuple[int, ShardEntry]], fingerprint: str
) -> Documents:
    bounds = [_read_bounds(data.path, shard) for _, shard in shards]
    sizes = np.array([len(b) - 1 for b in bounds], dtype=np.int64)
    domain_of_shard = np.array([domain for domain, _ in shards], dtype=np.int16)
    # An empty (0, 2) in front: a split without documents is no special case.
    starts = np.concatenate([np.empty((0, 2), np.int64), *(b[:-1] for b in bounds)])
    widths = np.concatenate([np.empty((0, 2), np.int64), *(np.diff(b, axis=0) for b in bounds)])
    return Documents(
        [_map_tokens(data.path, shard, data.manifest.dtype) for _, shard in shards],
        shard_index=np.repeat(np.arange(len(shards), dtype=np.int32), sizes),
        starts=np.ascontiguousarray(starts[:, 0]),
        lengths=np.ascontiguousarray(widths[:, 0]),
        n_bytes=np.ascontiguousarray(widths[:, 1]),
        domain_index=np.repeat(domain_of_shard, sizes),
        domains=data.domains,
        fingerprint=fingerprint,
        bos_id=data.manifest.bos_id,
    )


def _read_bounds(folder: Path, shard: ShardEntry) -> NDArray[np.int64]:
    path = folder / shard.documents_file.name
    try:
        bounds = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}", hint="prepare the data again") from error
    if bounds.shape != (shard.documents + 1, 2) or bounds[-1, 0] != shard.tokens:
        raise DataError(f"{path} does not fit the manifest", hint="prepare the data again")
    return np.asarray(bounds, dtype=np.int64)


def _map_tokens(folder: Path, shard: ShardEntry, dtype: str) -> Tokens:
    mapped = np.memmap(
        folder / shard.tokens_file.name, dtype=np.dtype(dtype).newbyteorder("<"), mode="r"
    )
    # A plain array over the same pages: slicing a memmap object costs microseconds.
    return np.asarray(mapped).view(np.ndarray)
