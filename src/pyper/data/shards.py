"""Token shards, read through memory maps; `pyper.data.shard_writer` says what is in them."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyper.data.manifest import (
    TOKENIZER,
    DataManifest,
    ShardEntry,
    SplitEntry,
    check_file,
    read_manifest,
)
from pyper.data.sources import SPLITS, Split
from pyper.data.tokenizer import TextTokenizer
from pyper.errors import DataError

Tokens = NDArray[np.unsignedinteger[Any]]


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
        weights: per shard, uint8 (tokens,), 1 for those to learn from; None where all of them are.
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
        weights: Sequence[Tokens | None] = (),
    ) -> None:
        self.shards = shards
        self._weights = weights
        self.weights = _weights_or_none(shards, weights, shard_index)
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
            weights=self._weights,
        )


def _weights_or_none(
    shards: Sequence[Tokens], weights: Sequence[Tokens | None], shard_index: NDArray[np.int32]
) -> list[Tokens] | None:
    """None too where only documents that were not chosen have any: plain text stays as fast."""
    weighed = [i for i, own in enumerate(weights) if own is not None]
    if not np.isin(shard_index, weighed).any():
        return None
    return [_ones(s) if own is None else own for s, own in zip(shards, weights, strict=True)]


def _ones(shard: Tokens) -> Tokens:
    """A weight of 1 for every token, without memory."""
    return np.broadcast_to(np.uint8(1), len(shard))


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
        weights=[_map_weights(data.path, shard) for _, shard in shards],
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
    return _map(folder / shard.tokens_file.name, np.dtype(dtype).newbyteorder("<"))


def _map_weights(folder: Path, shard: ShardEntry) -> Tokens | None:
    if shard.weights_file is None:
        return None
    return _map(folder / shard.weights_file.name, np.dtype(np.uint8))


def _map(path: Path, dtype: np.dtype[Any]) -> Tokens:
    mapped = np.memmap(path, dtype=dtype, mode="r")
    # A plain array over the same pages: slicing a memmap object costs microseconds.
    return np.asarray(mapped).view(np.ndarray)
