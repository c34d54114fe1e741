"""Files that come with Python and with torch, in an order that depends on their names alone."""

import hashlib
import importlib.util
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

_NOT_LIBRARY = frozenset((
    "test", "tests", "site-packages", "dist-packages", "__pycache__", "idlelib", "lib2to3",
    "turtledemo", "pydoc_data", "ensurepip", "encodings", "lib-dynload",
))  # fmt: skip
_PER_FILE_BYTES = 24_000
"""From one file at most, so that a few long files do not make up a domain."""


def standard_library() -> Iterator[tuple[str, str]]:
    """Modules as (name, source); never the tests, which some images leave out."""
    root = Path(sysconfig.get_path("stdlib"))
    # _sysconfigdata and config- folders are about the machine that built Python.
    files = list_files(root, ".py", skip=_NOT_LIBRARY, prefix_skip=("_sysconfigdata", "config-"))
    for name in shuffled(files):
        yield name.removesuffix(".py").replace("/", "."), read_text(root / name)


def package_folder(name: str) -> Path | None:
    """Where a package is installed, None when it is not; the package is not imported."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def list_files(
    root: Path, suffix: str, *, skip: Iterable[str] = (), prefix_skip: tuple[str, ...] = ()
) -> list[str]:
    """Names of files under `root` (with `/`), sorted, without folders named in `skip`."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in skip and not f.startswith(prefix_skip or " ")]
        relative = Path(folder).relative_to(root)
        for name in files:
            if name.endswith(suffix) and not name.startswith(prefix_skip or " "):
                found.append((relative / name).as_posix())
    return sorted(found)


def shuffled(names: Iterable[str]) -> list[str]:
    """The names in the order of their hashes: any first part is an even sample of all."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def read_text(path: Path) -> str:
    """The text of a file, empty when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")
    except OSError:
        return ""


def some(texts: Iterable[str], limit: int = _PER_FILE_BYTES) -> Iterator[str]:
    """The first texts, until they hold `limit` characters."""
    size = 0
    for text in texts:
        if size >= limit:
            return
        size += len(text)
        yield text


def sections(text: str, chars: int = 6_000) -> Iterator[str]:
    """A long text in parts of about `chars`, cut between paragraphs."""
    part: list[str] = []
    size = 0
    for paragraph in re.split(r"\n[ \t]*\n", text.strip("\n")):
        if part and size + len(paragraph) > chars:
            yield "\n\n".join(part) + "\n"
            part, size = [], 0
        part.append(paragraph)
        size += len(paragraph)
    if part:
        yield "\n\n".join(part) + "\n"
