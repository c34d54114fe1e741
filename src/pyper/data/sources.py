"""Which files there are, which domain and split each belongs to, and how to open them."""

import difflib
import gzip
import hashlib
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, cast

from pyper.data.hub import PREFIX, HubSplit, find_splits, parse_name
from pyper.errors import DataError, MissingExtraError

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")

Kind = Literal["text", "jsonl", "csv", "parquet", "arrow", "hub"]

_COMPRESSED = (".gz", ".xz", ".zst")
_TEXT = frozenset((
    ".txt", ".md", ".rst", ".tex", ".html", ".htm", ".xml", ".json", ".yaml",
    ".yml", ".toml", ".ini", ".log", ".srt", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp",
    ".cu", ".cuh", ".rs", ".go", ".java", ".js", ".ts", ".rb", ".sh", ".sql", ".r", ".jl", ".lua",
))  # fmt: skip
_TABLES: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
# What `datasets` writes beside the rows in `save_to_disk`.
_SAVED_STATE, _SAVED_SPLITS = "state.json", "dataset_dict.json"
# Also Hugging Face's `train-00000-of-00002.parquet`.
_SPLIT_NAME = re.compile(r"(train|valid|validation|val|dev|test)(?:[-_]\d[-_\w]*)?", re.IGNORECASE)
_MAX_NAME_BYTES = 200
_COMPANIONS = re.compile(r"(readme|license|licence|copying|citation)\b.*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to read: `name` is its path inside the source it was found in.

    A split of a data set on the hub is one too; its `path` is its name.
    """

    path: Path
    name: str
    domain: str
    split: Split | None
    kind: Kind
    hub: HubSplit | None = None

    def sha256(self) -> str:
        """Hash of the bytes on disk."""
        if self.hub is not None:
            return self.hub.sha256()
        with reading(self.path), self.path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()


def find_files(sources: Sequence[Path]) -> tuple[list[SourceFile], int]:
    """All files to read (test, valid, train, then undecided), and how many were skipped.

    A folder holds one domain for each sub-folder or file directly in it, or is itself one domain
    when it holds nothing but train, valid and test. Of several sources, each is one domain, folders
    too. A data set that `datasets` saved is one domain; so is one that is named, `hf:owner/name`.
    Hidden files do not count, nor do README and LICENSE beside domains or splits. Raises DataError
    for a missing source, and where nothing is text.
    """
    if not sources:
        raise DataError("no source was given", hint="name files or folders with text")
    several = len(sources) > 1
    local = [source for source in sources if not str(source).startswith(PREFIX)]
    candidates = [found for source in local for found in _find(source, one_domain=several)]
    unique = {found.path.resolve(): found for found in reversed(candidates)}
    files, skipped = [], 0
    for found in sorted(unique.values(), key=lambda found: (found.domain, found.name)):
        kind = _kind(found.path)
        skipped += kind is None
        if kind is not None:
            files.append(SourceFile(*found, kind))
    for source in sources:
        if source not in local:
            files += _find_on_hub(str(source))
    if not files:
        seen = f"{skipped} files are not text" if skipped else "there are no files"
        raise DataError(
            f"no text in {', '.join(map(str, sources))} ({seen})",
            hint="Pyper reads .txt, .jsonl, .csv and other text (also .gz, .xz, .zst), .parquet, "
            ".arrow, .feather, and what `datasets` saved",
        )
    rank = {"test": 0, "valid": 1, "train": 2, None: 3}
    return sorted(files, key=lambda file: rank[file.split]), skipped


def _find_on_hub(text: str) -> Iterator[SourceFile]:
    for split in find_splits(parse_name(text)):
        name, domain = str(split.name), split.name.name.rpartition("/")[2]
        kept = split_of(Path(split.name.split or ""))
        yield SourceFile(Path(name), name, domain, kept, "hub", split)


class _Found(NamedTuple):
    path: Path
    name: str
    domain: str
    split: Split | None


def _find(source: Path, *, one_domain: bool) -> Iterator[_Found]:
    if source.is_file():
        split = split_of(source)
        parent = source.resolve().parent
        yield _Found(source, source.name, _domain(parent if split else source), split)
        return
    if not source.is_dir():
        raise _missing(source)
    entries = _data_entries(source)
    if one_domain or _is_saved(source) or _holds_only_splits(entries):
        yield from _find_in_domain(source, _domain(source.resolve()), prefix=source.resolve().name)
        return
    for entry in entries:
        if entry.is_dir():
            yield from _find_in_domain(entry, _domain(entry), prefix=entry.name)
        else:
            yield _Found(entry, entry.name, _domain(entry), None)


def _find_in_domain(folder: Path, domain: str, prefix: str) -> Iterator[_Found]:
    by_name = _is_saved(folder) or _holds_only_splits(_data_entries(folder))
    entries = _data_entries(folder) if by_name else _visible(folder)
    for entry in entries:
        # In a folder of source code a sub-folder `test` is code like any other.
        split = split_of(entry) if entry.is_file() or by_name else None
        for path in [entry] if entry.is_file() else _walk(entry):
            name = f"{prefix}/{path.relative_to(folder).as_posix()}"
            yield _Found(path, name, domain, split)


def _walk(folder: Path) -> Iterator[Path]:
    for entry in _visible(folder):
        if entry.is_file():
            yield entry
        elif not entry.is_symlink():  # a link to a parent would never end
            yield from _walk(entry)


def _visible(folder: Path) -> list[Path]:
    with reading(folder):
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    kept = sorted(entry for entry in entries if entry.is_file() or entry.is_dir())
    return _saved_rows(folder, kept) if _is_saved(folder) else kept


def _is_saved(folder: Path) -> bool:
    """Whether `datasets` wrote this folder with `save_to_disk`."""
    return (folder / _SAVED_STATE).is_file() or (folder / _SAVED_SPLITS).is_file()


def _saved_rows(folder: Path, entries: list[Path]) -> list[Path]:
    """Of such a folder the files of rows, or the folders of splits; not what it caches there."""
    if (folder / _SAVED_SPLITS).is_file():
        return [entry for entry in entries if entry.is_dir()]
    try:
        state = json.loads((folder / _SAVED_STATE).read_bytes())
        names = {item["filename"] for item in state["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError):
        names = {entry.name for entry in entries if entry.suffix == ".arrow"}
    return [entry for entry in entries if entry.name in names]


def _data_entries(folder: Path) -> list[Path]:
    return [entry for entry in _visible(folder) if not _COMPANIONS.fullmatch(entry.name)]


def _holds_only_splits(entries: Sequence[Path]) -> bool:
    return bool(entries) and all(split_of(entry) for entry in entries)


def split_of(path: Path) -> Split | None:
    """The split that a file's or folder's name stands for."""
    found = _SPLIT_NAME.fullmatch(path.name.split(".")[0])
    if not found:
        return None
    name = found[1].lower()
    return "train" if name == "train" else "test" if name == "test" else "valid"


def _domain(path: Path) -> str:
    name = path.name
    if path.is_file():
        while Path(name).suffix.lower() in {*_COMPRESSED, *_TEXT, *_TABLES}:
            name = Path(name).stem
    return short_name(name) or "text"


def short_name(name: str) -> str:
    """A domain's name that leaves room for `-000.documents.npy` in the 255 bytes of a file's."""
    return name.encode("utf-8", "replace")[:_MAX_NAME_BYTES].decode("utf-8", "ignore")


def _kind(path: Path) -> Kind | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
        inner = suffixes[-1] if suffixes else ""
        kind = _TABLES.get(inner, "text" if inner in _TEXT else None)
        return kind if kind in ("jsonl", "csv", "text") else None
    suffix = suffixes[-1] if suffixes else ""
    if suffix in _TABLES:
        return _TABLES[suffix]
    return "text" if suffix in _TEXT or _looks_like_text(path) else None


def _looks_like_text(path: Path) -> bool:
    with reading(path), path.open("rb") as stream:
        head = stream.read(4096)
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # not just a character cut in two by the 4096
            return False
    return b"\0" not in head


def _missing(source: Path) -> DataError:
    if source.exists():
        return DataError(
            f"`{source}` is neither a file nor a folder",
            hint="text is read twice, which a pipe cannot be: write it to a file first",
        )
    parent = source.resolve().parent
    names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    close = difflib.get_close_matches(source.name, names, n=1)
    hint = f"did you mean `{source.parent / close[0]}`?" if close else "check the path"
    return DataError(f"there is no file or folder `{source}`", hint=hint)


def open_binary(path: Path) -> BinaryIO:
    """Open a file for reading, decompressed. Raises MissingExtraError without zstandard."""
    match path.suffix.lower():
        case ".gz":
            return cast(BinaryIO, gzip.open(path, "rb"))
        case ".xz":
            return cast(BinaryIO, lzma.open(path, "rb"))
        case ".zst":
            return _open_zst(path)
        case _:
            return path.open("rb")


def _open_zst(path: Path) -> BinaryIO:
    try:
        import zstandard
    except ImportError:
        raise MissingExtraError("zstandard", extra="data", needed_for=f"reading {path}") from None
    raw = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True)
    return cast(BinaryIO, io.BufferedReader(raw))  # the reader alone has no lines


@contextmanager
def reading(path: Path, *errors: type[Exception]) -> Iterator[None]:
    """Turn what can go wrong with a file (and `errors`) into a DataError that names it."""
    unreadable: tuple[type[Exception], ...] = (OSError, EOFError, lzma.LZMAError, zlib.error)
    unreadable += (*errors, *_zstd_errors())
    try:
        yield
    except unreadable as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(
            f"cannot read {path}: {reason}",
            hint="check its permissions, and that it was copied whole",
        ) from error


def _zstd_errors() -> tuple[type[Exception], ...]:
    try:
        import zstandard
    except ImportError:
        return ()
    return (zstandard.ZstdError,)
