"""Rows of tables: CSV, Parquet, Arrow and Feather, each as a record of columns."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from pyper.data.sources import open_binary, reading
from pyper.errors import DataError, MissingExtraError

Record = dict[str, Any]
_ROWS_AT_ONCE = 256
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
# Of a field. The csv module's own limit is 128 kB, and one book is more.
_MOST_CHARS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which columns of a table are asked for.

    any_of: of which one will do (the text, or messages).
    all_of: which filters name.
    optional: which may be missing.
    """

    any_of: Sequence[str]
    all_of: Sequence[str] = ()
    optional: Sequence[str] = ()

    def columns(self, there: Sequence[str]) -> list[str]:
        """Those to read; all of them where something is missing, for the message that says so."""
        if not set(self.any_of) & set(there) or not set(self.all_of) <= set(there):
            return list(there)
        asked = {*self.any_of, *self.all_of, *self.optional}
        return [name for name in there if name in asked]


def read_csv(path: Path) -> Iterator[tuple[Record, str]]:
    """Rows of a `.csv` or `.tsv` with a header, and their places; columns are text.

    Quotes, line ends inside them, and a byte order mark are read as RFC 4180 and Excel have them. A
    header without a comma but with semicolons is separated by those. A short row lacks its last
    columns. Raises DataError for a row with too many, or a quote that is never closed.
    """
    with reading(path, UnicodeError), open_binary(path) as binary:
        text = _text_of(binary)
        first = text.readline()
        lines = _chain(first, text)
        csv.field_size_limit(_MOST_CHARS)
        rows = csv.reader(lines, delimiter=_delimiter(path, first), strict=True)
        try:
            header = next(rows, None)
            if header is None:
                return
            _check_header(path, header)
            yield from _csv_rows(path, header, rows)
        except csv.Error as error:
            raise DataError(
                f"{path}, line {rows.line_num}: {error}",
                hint='quotes inside a field are written twice: "she said ""no"""',
            ) from None


def _csv_rows(path: Path, header: list[str], rows: Any) -> Iterator[tuple[Record, str]]:
    line = rows.line_num
    for row in rows:
        if len(row) > len(header):
            raise DataError(
                f"{path}, line {line + 1}: {len(row)} fields, but the header has {len(header)}",
                hint="put fields that hold the separator into quotes",
            )
        if row:
            yield dict(zip(header, row, strict=False)), f":{line + 1}"
        line = rows.line_num


def _text_of(binary: BinaryIO) -> io.TextIOWrapper:
    """Bytes that are no UTF-8 stay, as half characters, to be counted where text is cleaned."""
    is_utf16 = cast(Any, binary).peek(2)[:2] in _UTF16
    encoding, errors = ("utf-16", "replace") if is_utf16 else ("utf-8-sig", "surrogateescape")
    return io.TextIOWrapper(binary, encoding=encoding, errors=errors, newline="")


def _chain(first: str, rest: Iterable[str]) -> Iterator[str]:
    if first:
        yield first
    yield from rest


def _delimiter(path: Path, header: str) -> str:
    if ".tsv" in [suffix.lower() for suffix in path.suffixes[-2:]]:
        return "\t"
    return ";" if ";" in header and "," not in header else ","


def _check_header(path: Path, header: list[str]) -> None:
    twice = {name for name in header if header.count(name) > 1}
    if twice:
        raise DataError(
            f"{path} has two columns called `{sorted(twice)[0]}`",
            hint="the first line must name the columns, each by a name of its own",
        )


def read_parquet(path: Path, wanted: Wanted) -> Iterator[tuple[Record, str]]:
    """Rows of a `.parquet`; of its columns those that are `wanted`."""
    arrow = _arrow(path)
    import pyarrow.parquet

    with reading(path, arrow.ArrowException), pyarrow.parquet.ParquetFile(path) as table:
        columns = wanted.columns(table.schema_arrow.names)
        yield from _rows(table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns), columns)


def read_arrow(path: Path, wanted: Wanted) -> Iterator[tuple[Record, str]]:
    """Rows of an Arrow file or stream (as `datasets` saves them) or a `.feather`."""
    arrow = _arrow(path)
    with reading(path, arrow.ArrowException), _open_arrow(path, arrow) as (schema, batches):
        yield from _rows(batches, wanted.columns(schema.names))


@contextmanager
def _open_arrow(path: Path, arrow: Any) -> Iterator[tuple[Any, Iterable[Any]]]:
    with path.open("rb") as stream:
        start = stream.read(6)
    if start[:4] == b"FEA1":
        raise DataError(
            f"{path} is of Feather's first version, which nothing writes any more",
            hint="read it with an old pandas and save it as `.parquet`",
        )
    with arrow.memory_map(str(path)) as source:
        if start == b"ARROW1":
            with arrow.ipc.open_file(source) as file:
                batches = (file.get_batch(i) for i in range(file.num_record_batches))
                yield file.schema, batches
        else:
            with arrow.ipc.open_stream(source) as batches:
                yield batches.schema, batches


def _rows(batches: Iterable[Any], columns: list[str]) -> Iterator[tuple[Record, str]]:
    number = 0
    for batch in batches:
        chosen = batch.select(columns)
        for start in range(0, chosen.num_rows, _ROWS_AT_ONCE):
            # A few rows at a time: as Python objects they take several times the memory.
            for record in chosen.slice(start, _ROWS_AT_ONCE).to_pylist():
                yield record, f":{number}"
                number += 1


def _arrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise MissingExtraError("pyarrow", extra="data", needed_for=f"reading {path}") from None
    return pyarrow
