"""The manifest of a data folder: what it holds, how it was made, and a hash of every file."""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from pyper.data.sources import Split
from pyper.errors import DataError

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_serializer(mode="wrap")
    def _without_nothing(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What a folder lacks is not written: its hash is what it was before there was such."""
        values: dict[str, Any] = handler(self)
        fields = type(self).model_fields
        return {k: v for k, v in values.items() if v is not None or fields[k].is_required()}


class FileEntry(_Entry):
    """A file of the data folder; `name` is relative to it."""

    name: str
    bytes: int
    sha256: str


class ShardEntry(_Entry):
    """Two files: the tokens one after the other, and where each document starts.

    A third one, where some tokens are not learned from: a byte for each token, its weight.
    """

    documents: int
    tokens: int
    tokens_file: FileEntry
    documents_file: FileEntry
    weights_file: FileEntry | None = None

    def files(self) -> list[FileEntry]:
        """All files of the shard."""
        weights = [] if self.weights_file is None else [self.weights_file]
        return [self.tokens_file, self.documents_file, *weights]


class SplitEntry(_Entry):
    """One split of one domain; tokens include one `bos` per document, bytes are of UTF-8 text."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    shards: list[ShardEntry] = Field(default_factory=list)


class SourceEntry(_Entry):
    """A file that was read; `name` is its path inside its source, or that of a named data set."""

    name: str
    domain: str
    split: Split | None
    sha256: str


class DataManifest(_Entry):
    """What a data folder holds. Two folders with equal fingerprints hold the same tokens."""

    version: Literal[1] = 1
    tokenizer_fingerprint: str
    tokenizer_file: FileEntry
    vocab_size: int
    bos_id: int
    chat_template_file: FileEntry | None = None
    """What wrote the chats as text, where there are any."""
    dtype: Literal["uint16", "uint32"]
    domains: dict[str, dict[Split, SplitEntry]]
    """By domain name (sorted), then by split."""
    counts: dict[str, int]
    """What reading mended and left out; see `ReadCounts`."""
    settings: dict[str, str | int | float]
    sources: list[SourceEntry]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest's canonical JSON."""
        canonical = json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def total(self, split: Split) -> SplitEntry:
        """Documents, tokens and bytes of a split over all domains; no shards."""
        entries = [splits[split] for splits in self.domains.values() if split in splits]
        return SplitEntry(
            documents=sum(entry.documents for entry in entries),
            tokens=sum(entry.tokens for entry in entries),
            bytes=sum(entry.bytes for entry in entries),
        )

    def files(self) -> list[FileEntry]:
        """Every file of the folder but the manifest itself."""
        shards = [s for splits in self.domains.values() for e in splits.values() for s in e.shards]
        template = [] if self.chat_template_file is None else [self.chat_template_file]
        return [
            self.tokenizer_file,
            *template,
            *(file for shard in shards for file in shard.files()),
        ]


def read_manifest(folder: Path) -> DataManifest:
    """The manifest of a data folder. Raises DataError when there is none, or it is damaged."""
    try:
        return DataManifest.model_validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise _no_data(folder) from None
    except (OSError, ValidationError) as error:
        raise DataError(
            f"{folder / MANIFEST} is damaged or from another version of Pyper",
            hint="remove the folder and run `pyper prepare` again",
        ) from error


def _no_data(folder: Path) -> DataError:
    prepare = "make one with `pyper prepare SOURCE -o FOLDER`"
    if not folder.is_dir():
        return DataError(f"there is no data folder `{folder}`", hint=prepare)
    return DataError(
        f"`{folder}` is no finished data folder: it has no {MANIFEST}",
        hint=f"if it is left from an interrupted run, remove it; {prepare}",
    )


def describe(path: Path, folder: Path) -> FileEntry:
    """Name, size and hash of a file in `folder`."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    name = path.relative_to(folder).as_posix()
    return FileEntry(name=name, bytes=path.stat().st_size, sha256=digest)


def check_file(entry: FileEntry, folder: Path, *, verify: bool) -> None:
    """Compare a file with its entry: its size, with `verify` its hash. Raises DataError."""
    path = folder / entry.name
    hint = "copy the folder again, or remove it and run `pyper prepare` again"
    if not path.is_file():
        raise DataError(f"{path} is missing", hint=hint)
    size = path.stat().st_size
    if size != entry.bytes:
        raise DataError(f"{path} has {size:,} bytes instead of {entry.bytes:,}", hint=hint)
    if verify and describe(path, folder).sha256 != entry.sha256:
        raise DataError(f"{path} is damaged: its SHA-256 differs from the manifest", hint=hint)
