"""Files and folders to cleaned documents, counting all that was mended or left out."""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyper.config import PrepareConfig
from pyper.data.sources import SourceFile, Split, find_files, open_binary, reading
from pyper.errors import DataError, MissingExtraError

_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")


@dataclass(frozen=True, slots=True)
class Document:
    """One text, its domain, the split its file was named after, and where it came from."""

    text: str
    domain: str
    split: Split | None
    source: str


@dataclass(slots=True)
class ReadCounts:
    """What was read, mended and left out; each field counts documents unless it says otherwise."""

    files: int = 0
    documents: int = 0
    """Documents handed on, duplicates not included once `prepare` has found them."""
    duplicates: int = 0
    empty: int = 0
    too_short: int = 0
    bad_utf8: int = 0
    """With bytes that are no UTF-8; each became U+FFFD."""
    nul_bytes: int = 0
    """With NUL characters, which were removed."""
    byte_order_marks: int = 0
    malformed_lines: int = 0
    """Lines of `.jsonl` without a JSON object that has a text."""
    skipped_files: int = 0
    """Files that are not text."""

    def as_dict(self) -> dict[str, int]:
        return dataclasses.asdict(self)


def read_documents(
    sources: Sequence[Path], config: PrepareConfig, counts: ReadCounts
) -> Iterator[Document]:
    """Documents of all sources in a fixed order: test files first, then valid, then train.

    That order lets de-duplication drop the training copy of a held-out document. At most one
    text file is held in memory; `.jsonl` is read by the line, `.parquet` by the batch. Adds to
    `counts`. Raises DataError for a source that is missing, unreadable or has no text, and
    MissingExtraError for `.zst` and `.parquet` without their packages.
    """
    files, skipped = find_files(sources)
    counts.skipped_files += skipped
    yield from read_files(files, config, counts)


def read_files(
    files: Iterable[SourceFile], config: PrepareConfig, counts: ReadCounts
) -> Iterator[Document]:
    """The documents of files already found; see `read_documents`."""
    for file in files:
        counts.files += 1
        yield from _read_file(file, config, counts)


def _read_file(file: SourceFile, config: PrepareConfig, counts: ReadCounts) -> Iterator[Document]:
    for text, place in _texts(file, config, counts):
        cleaned = _clean(text, counts)
        if not cleaned or cleaned.isspace():
            counts.empty += 1
        elif len(cleaned) < config.min_chars:
            counts.too_short += 1
        else:
            counts.documents += 1
            yield Document(cleaned, file.domain, file.split, f"{file.name}{place}")


def _texts(
    file: SourceFile, config: PrepareConfig, counts: ReadCounts
) -> Iterator[tuple[str, str]]:
    """Raw texts with their place in the file (`:12` is line or row 12)."""
    if file.kind == "jsonl":
        yield from _read_jsonl(file.path, config.text_key, counts)
    elif file.kind == "parquet":
        yield from _read_parquet(file.path, config.text_key)
    else:
        with reading(file.path), open_binary(file.path) as stream:
            data = stream.read()
        yield from _cut_text(_decode(data, counts), config)


def _cut_text(text: str, config: PrepareConfig) -> Iterator[tuple[str, str]]:
    if config.split_by != "blank-line":
        yield text, ""
        return
    parts = (part.strip("\n") for part in _BLANK_LINES.split(text.replace("\r\n", "\n")))
    yield from ((part, f":{i}") for i, part in enumerate(parts) if part)


def _read_jsonl(path: Path, key: str, counts: ReadCounts) -> Iterator[tuple[str, str]]:
    good, first_bad = 0, 0
    with reading(path), open_binary(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            text = _json_text(line, key, counts, where=f"{path}:{number}", strict=not good)
            if text is None:
                counts.malformed_lines += 1
                first_bad = first_bad or number
            else:
                good += 1
                yield text, f":{number}"
    if first_bad and not good:
        raise DataError(
            f"no line of {path} is a JSON object with a text; the first bad line is {first_bad}",
            hint='each line should read {"text": "..."}; give plain text the extension .txt',
        )


def _json_text(
    line: bytes, key: str, counts: ReadCounts, *, where: str, strict: bool
) -> str | None:
    """The text of one line, None when malformed; `strict` refuses an object without the key."""
    try:
        record = json.loads(_without_mark(_decode(line, counts), counts))
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    if key not in record:
        if strict:
            raise _missing_key(where, key, record)
        return None
    value = record[key]
    return "" if value is None else value if isinstance(value, str) else None


def _read_parquet(path: Path, key: str) -> Iterator[tuple[str, str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("pyarrow", extra="data", needed_for=f"reading {path}") from None
    with reading(path, pyarrow.ArrowException), pyarrow.parquet.ParquetFile(path) as table:
        if key not in table.schema_arrow.names:
            raise _missing_key(str(path), key, table.schema_arrow.names)
        rows = (
            value
            for batch in table.iter_batches(batch_size=256, columns=[key])
            for value in batch.column(0).to_pylist()
        )
        for number, value in enumerate(rows):
            if value is not None and not isinstance(value, str):
                raise DataError(f"column `{key}` of {path} holds no text but {type(value)}")
            yield value or "", f":{number}"


def _missing_key(where: str, key: str, there: Iterable[Any]) -> DataError:
    names = ", ".join(f"`{name}`" for name in list(there)[:12]) or "none"
    return DataError(
        f"{where} has no key `{key}`; keys there: {names}",
        hint="name the key that holds the text with `--text-key`",
    )


def _decode(data: bytes, counts: ReadCounts) -> str:
    try:
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):  # what some Windows programs call Unicode
            return data.decode("utf-16")
        return data.decode("utf-8")
    except UnicodeDecodeError:
        counts.bad_utf8 += 1
        return data.decode("utf-8", "replace")


def _clean(text: str, counts: ReadCounts) -> str:
    text = _without_mark(text, counts)
    if "\0" in text:
        counts.nul_bytes += 1
        text = text.replace("\0", "")
    return _without_surrogates(text.replace("\r\n", "\n"), counts)


def _without_mark(text: str, counts: ReadCounts) -> str:
    if not text.startswith("\ufeff"):
        return text
    counts.byte_order_marks += 1
    return text.lstrip("\ufeff")


def _without_surrogates(text: str, counts: ReadCounts) -> str:
    """JSON may escape half a character (`\\ud83d`), which no UTF-8 can hold."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        counts.bad_utf8 += 1
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
