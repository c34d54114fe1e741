"""Records in JSON: a line each, or a file that is a list of them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pyper.data.cleaning import decode, without_mark
from pyper.data.counts import ReadCounts
from pyper.data.sources import open_binary, reading

Records = Iterator[tuple[Mapping[str, Any] | None, str]]
"""With their places, `:12`; None for what is no record."""


def read_jsonl(path: Path, counts: ReadCounts) -> Records:
    """The lines of a `.jsonl`, counted from 1."""
    with reading(path), open_binary(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(without_mark(decode(line, counts), counts))
            except (ValueError, RecursionError):
                record = None
            yield record if isinstance(record, dict) else None, f":{number}"


def read_list(path: Path) -> list[Any]:
    """The items of a `.json` (also compressed) that is a list; none where it is anything else."""
    if ".json" not in [suffix.lower() for suffix in path.suffixes[-2:]]:
        return []
    with reading(path), open_binary(path) as stream:
        data = stream.read()
    counts = ReadCounts()  # whoever reads it as text counts what is mended
    try:
        found = json.loads(without_mark(decode(data, counts), counts))
    except (ValueError, RecursionError):
        return []
    return found if isinstance(found, list) else []
