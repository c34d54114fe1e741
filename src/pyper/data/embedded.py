"""The embedded corpus: eight domains from the text that every installation carries.

The standard library's manual, docstrings, code and bytecode, the C++ headers, licences and
mathematics that come with torch, and the names of Unicode. Nothing is downloaded. The text depends
on the versions of Python and of these packages, on nothing else: not on paths, times or other
packages. It is for trying Pyper, not for models that anybody should use.
"""

import hashlib
import json
import platform
from collections.abc import Callable, Iterator
from functools import cached_property
from importlib import metadata
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from pyper.data import harvest_code, harvest_text
from pyper.errors import DataError, StorageError

REPORT = ".embedded.json"
"""Hidden, so that the corpus folder holds one file for each domain and nothing else to read."""
_VERSION = 1
_MIN_BYTES = 50_000
"""A domain with less (sympy may be missing, or the manual) is replaced by a spare."""

_DOMAINS: dict[str, Callable[[], Iterator[str]]] = {
    "manual": harvest_text.manual,
    "docstrings": harvest_text.docstrings,
    "python": harvest_code.python,
    "cpp": harvest_code.cpp,
    "maths": harvest_code.maths,
    "licences": harvest_text.licences,
    "unicode": harvest_text.unicode_names,
    "bytecode": harvest_code.bytecode,
}
_SPARES: dict[str, Callable[[], Iterator[str]]] = {
    "cmake": harvest_code.build_files,
    "calendars": harvest_text.calendars,
    "codecs": harvest_text.codecs,
}


class HarvestedDomain(BaseModel):
    """Documents, and bytes of UTF-8 text, of one domain; the hash is of its file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    documents: int
    bytes: int
    sha256: str


class HarvestReport(BaseModel):
    """What `harvest` wrote; equal fingerprints mean equal text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    domains: dict[str, HarvestedDomain]
    settings: dict[str, str | int]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the names and hashes of the domains."""
        hashes = {name: domain.sha256 for name, domain in sorted(self.domains.items())}
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def harvest(output: Path, max_bytes_per_domain: int = 2_000_000) -> HarvestReport:
    """Write `<output>/<domain>.jsonl` for eight domains, or return what is there already.

    Raises DataError when this installation lacks the text for eight domains or `output` holds
    other files, StorageError when it cannot be written.
    """
    settings = _settings(max_bytes_per_domain)
    finished = _finished(output, settings)
    if finished is not None:
        return finished
    try:
        return _harvest(output, settings, max_bytes_per_domain)
    except OSError as error:
        raise StorageError(
            f"cannot write the embedded corpus to {output}: {error.strerror or error}",
            hint="free some space, or choose a folder you may write to",
        ) from error


def _harvest(output: Path, settings: dict[str, str | int], limit: int) -> HarvestReport:
    _clear(output)
    domains: dict[str, HarvestedDomain] = {}
    for name, documents in (_DOMAINS | _SPARES).items():
        if len(domains) == len(_DOMAINS):
            break
        texts = _first(documents(), limit)
        if sum(len(text.encode()) for text in texts) >= min(_MIN_BYTES, limit // 2):
            domains[name] = _write(output / f"{name}.jsonl", texts)
    if len(domains) < len(_DOMAINS):
        raise DataError(
            f"this installation only has text for {', '.join(domains)}",
            hint="use your own text with `pyper prepare`, or install the complete Python",
        )
    report = HarvestReport(domains=domains, settings=settings)
    _replace(output / REPORT, report.model_dump_json(indent=1))
    return report


def _first(documents: Iterator[str], limit: int) -> list[str]:
    """Different documents up to `limit` bytes; one that does not fit is passed over."""
    texts: dict[str, None] = {}
    size, misses = 0, 0
    for text in documents:
        length = len(text.encode())
        if text in texts or size + length > limit:
            misses += size + length > limit
            if misses >= 20:
                break
            continue
        texts[text] = None
        size += length
    return list(texts)


def _write(path: Path, texts: list[str]) -> HarvestedDomain:
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    _replace(path, content)
    return HarvestedDomain(
        documents=len(texts),
        bytes=sum(len(text.encode()) for text in texts),
        sha256=hashlib.sha256(content.encode()).hexdigest(),
    )


def _replace(path: Path, content: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(content, encoding="utf-8", newline="\n")
    partial.replace(path)


def _clear(output: Path) -> None:
    """Make the folder; remove an older harvest, and nothing that is not one."""
    output.mkdir(parents=True, exist_ok=True)
    ours = {f"{name}.jsonl" for name in _DOMAINS | _SPARES}
    others = [p.name for p in output.iterdir() if p.name not in ours and p.name[0] != "."]
    if others:
        raise DataError(
            f"`{output}` holds other files ({', '.join(sorted(others)[:3])})",
            hint="choose an empty or a new folder for the embedded corpus",
        )
    (output / REPORT).unlink(missing_ok=True)  # first: without it the folder is not complete
    for name in ours:
        (output / name).unlink(missing_ok=True)


def _settings(limit: int) -> dict[str, str | int]:
    settings: dict[str, str | int] = {"version": _VERSION, "max_bytes_per_domain": limit}
    settings["python"] = platform.python_version()
    for package in ("torch", "sympy"):
        try:
            settings[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            settings[package] = ""
    return settings


def _finished(output: Path, settings: dict[str, str | int]) -> HarvestReport | None:
    try:
        report = HarvestReport.model_validate_json((output / REPORT).read_bytes())
        whole = all(
            hashlib.sha256((output / f"{name}.jsonl").read_bytes()).hexdigest() == domain.sha256
            for name, domain in report.domains.items()
        )
    except (OSError, ValidationError):
        return None
    return report if whole and report.settings == settings else None
