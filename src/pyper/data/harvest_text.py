"""Prose and tables for the embedded corpus: each function yields the documents of one domain."""

import calendar
import importlib.metadata
import re
import sys
import sysconfig
import textwrap
import unicodedata
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from pyper.data.harvest_files import read_text, sections, shuffled, some, standard_library

# What `pip install pyper` brings; other packages would make the corpus differ between machines.
_LICENSED = (
    "torch", "numpy", "sympy", "networkx", "mpmath", "jinja2", "markupsafe", "fsspec", "filelock",
    "typing-extensions", "einops", "safetensors", "tokenizers", "huggingface-hub", "pydantic",
    "pydantic-core", "annotated-types", "typer", "rich", "click", "shellingham", "pygments",
    "markdown-it-py", "mdurl", "packaging", "pyyaml", "tqdm", "setuptools", "pip",
)  # fmt: skip
_LICENCE_NAME = re.compile(r"(licen[sc]e|copying|notice)[^/]*", re.IGNORECASE)
_DOCSTRING = re.compile(
    r"^[ \t]*(?:async )?(?P<kind>def|class) (?P<name>\w+)(?P<arguments>\([^()]*\))?[^:\n]*:"
    r'[ \t]*\n[ \t]+[rR]?"""(?P<text>.*?)"""',
    re.MULTILINE | re.DOTALL,
)


def manual() -> Iterator[str]:
    """The language reference, as `help("topics")` shows it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return
    for name in shuffled(topics):
        yield from sections(topics[name])


def docstrings() -> Iterator[str]:
    """What the standard library's functions and classes say about themselves."""
    for module, source in standard_library():
        yield from some(_docstrings(module, source))


def _docstrings(module: str, source: str) -> Iterator[str]:
    for found in _DOCSTRING.finditer(source):
        text = _dedent(found["text"])
        if len(text) >= 120:
            title = f"{module.removesuffix('.__init__')}.{found['name']}"
            arguments = re.sub(r"\s+", " ", found["arguments"] or "")
            yield f"{title}{arguments}\n\n{textwrap.indent(text, '    ')}\n"


def _dedent(docstring: str) -> str:
    first, _, rest = docstring.strip("\n").partition("\n")
    return f"{first.strip()}\n{textwrap.dedent(rest)}".strip()


def licences() -> Iterator[str]:
    """Licences of Python, torch and what torch depends on, each paragraph only once."""
    seen: set[int] = set()
    for text in _licence_texts():
        paragraphs = re.split(r"\n[ \t]*\n", text.strip("\n"))
        new = "\n\n".join(p for p in paragraphs if _is_new(p, seen))
        yield from (part for part in sections(new) if len(part) >= 300)


def _licence_texts() -> Iterator[str]:
    stdlib = Path(sysconfig.get_path("stdlib"))
    yield read_text(stdlib / "LICENSE.txt")
    for package in _LICENSED:
        try:
            files = importlib.metadata.distribution(package).files or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in sorted(files, key=str):
            if _LICENCE_NAME.fullmatch(file.name) and file.suffix in ("", ".txt", ".md"):
                yield read_text(Path(str(file.locate())))


def _is_new(paragraph: str, seen: set[int]) -> bool:
    """Whether most runs of eight words are new; BSD licences differ in a name or a comma.

    Python's hash of a string changes from run to run, but is only compared within this one.
    """
    words = re.findall(r"\w+", paragraph.lower())
    runs = {hash(tuple(words[i : i + 8])) for i in range(max(1, len(words) - 7))}
    repeated = len(runs & seen)
    seen |= runs
    return 2 * repeated <= len(runs)


def unicode_names() -> Iterator[str]:
    """Characters and their names, neighbours of one script together."""
    yield from shuffled(_unicode_lists())


def _unicode_lists() -> Iterator[str]:
    for _, run in groupby(_named_characters(), key=lambda named: (named[0] >> 5, named[1])):
        lines = [f"U+{code:04X} {name}" for code, _, name in run]
        if len(lines) >= 8:
            yield "\n".join(lines) + "\n"


def _named_characters() -> Iterator[tuple[int, str, str]]:
    """Code point, first word of the name (nearly always the script), name."""
    for code in range(0x20, min(sys.maxunicode, 0x1FFFF)):
        name = unicodedata.name(chr(code), "")
        # Those that end in their own number (ideographs, hieroglyphs) say nothing.
        if name and not name.endswith(f"{code:04X}") and not name[-1].isdigit():
            yield code, name.split()[0], name


def calendars() -> Iterator[str]:
    """A spare domain: the months of four centuries."""
    pages = calendar.TextCalendar()
    dates = [(year, month) for year in range(1700, 2100) for month in range(1, 13)]
    months = {f"{year}-{month}": (year, month) for year, month in dates}
    for name in shuffled(months):
        yield pages.formatmonth(*months[name])


def codecs() -> Iterator[str]:
    """A spare domain: tables of the one-byte character sets."""
    names = [*(f"cp{i}" for i in range(437, 1259)), *(f"iso8859-{i}" for i in range(1, 17))]
    for name in shuffled(names):
        try:
            chars = [(i, bytes([i]).decode(name, "ignore")) for i in range(128, 256)]
        except LookupError:
            continue
        named = [(i, unicodedata.name(c, "")) for i, c in chars if len(c) == 1]
        rows = [f"0x{i:02X} {title}" for i, title in named if title]
        for start in range(0, len(rows), 32):
            yield f"{name}\n" + "\n".join(rows[start : start + 32]) + "\n"
