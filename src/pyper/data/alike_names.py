"""Domains are files: two names may be one file where upper and lower case count the same."""

import tempfile
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from pyper.errors import DataError


def refuse_alike(domains: Iterable[str], output: Path) -> None:
    """Raises DataError for two domains whose files would be one where `output` will be."""
    seen: dict[str, str] = {}
    for name in domains:
        other = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name and not tells_apart(output, other, name):
            raise DataError(
                f"the domains `{other}` and `{name}` differ in case alone, and the file system "
                f"of {output} does not tell them apart",
                hint="rename one of them, or put both into one folder",
            )


def tells_apart(output: Path, name: str, other: str) -> bool:
    """Whether both can be files in one folder there; True where that cannot be tried."""
    parents = output.absolute().parents
    there = next((folder for folder in parents if folder.is_dir()), Path())
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".tmp-") as folder:
            (Path(folder) / name).touch()
            return not (Path(folder) / other).exists()
    except OSError:  # whoever writes next says why
        return True
