"""`MANIFEST.json`: what a folder holds, provably.

Neither torch nor safetensors notices a flipped bit in a weight; sizes and sha256 of every file do.
The manifest vouches for itself too: it ends with the hash of its own content and must be, byte for
byte, what this module writes.
"""

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from pyper.errors import CheckpointError

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"

MANIFEST = "MANIFEST.json"
VERSION = 1
_HASHERS = 4  # hashing releases the interpreter, and one thread does about 1 GB/s


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and sha256 (hex) of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Files by their path inside the folder, and what the writer wanted remembered."""

    files: Mapping[str, FileEntry]
    metadata: Mapping[str, Any]


def write_manifest(
    folder: Path,
    metadata: Mapping[str, Json] | None = None,
    *,
    known: Mapping[str, FileEntry] | None = None,
) -> Manifest:
    """Write the manifest of everything in `folder`; `known` saves hashing a file again.

    Raises CheckpointError when the folder holds a symbolic link.
    """
    known = dict(known or {})
    names = _files_of(folder)
    unknown = [name for name in names if name not in known]
    with ThreadPoolExecutor(_HASHERS) as pool:
        hashed = dict(zip(unknown, pool.map(lambda n: hash_file(folder / n), unknown), strict=True))
    manifest = Manifest({name: (known | hashed)[name] for name in names}, metadata or {})
    (folder / MANIFEST).write_bytes(_serialise(manifest))
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest alone, checked against its own hash. Raises CheckpointError."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError(f"no folder `{folder}`", hint="check the path")
    _refuse_links(folder, MANIFEST)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}",
            hint="the folder was not written to its end, or is no checkpoint",
        ) from None
    return _parse(path, content)


def verify_manifest(folder: Path, only: Collection[str] | None = None) -> Manifest:
    """Check size and hash of every listed file, or of `only` those (which must be listed).

    Raises CheckpointError that names the first file found missing, unlisted, outside of the folder,
    linked or different.
    """
    manifest = read_manifest(folder)
    names = list(manifest.files) if only is None else list(only)
    for name in names:
        if name not in manifest.files:
            raise CheckpointError(f"{folder / MANIFEST} does not list `{name}`")
        _check_size(folder, name, manifest.files[name])
    with ThreadPoolExecutor(_HASHERS) as pool:
        for name, entry in zip(
            names, pool.map(lambda n: hash_file(folder / n), names), strict=True
        ):
            if entry != manifest.files[name]:
                raise _damaged(folder / name, "its sha256 is not the one in the manifest")
    return manifest


def hash_file(path: Path) -> FileEntry:
    """Size and sha256 of a file as it can be read now. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return FileEntry(file.tell(), digest)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def canonical_json(value: Json) -> bytes:
    """One text per value: sorted keys, no spaces. NaN and infinities are kept, as Python reads."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _serialise(manifest: Manifest) -> bytes:
    body: dict[str, Json] = {
        "version": VERSION,
        "files": {n: {"size": f.size, "sha256": f.sha256} for n, f in manifest.files.items()},
        "metadata": manifest.metadata,
    }
    sealed = body | {"sha256": hashlib.sha256(canonical_json(body)).hexdigest()}
    return json.dumps(sealed, sort_keys=True, indent=1, ensure_ascii=False).encode() + b"\n"


def _parse(path: Path, content: bytes) -> Manifest:
    try:
        raw = json.loads(content)
        if raw["version"] != VERSION:
            raise CheckpointError(
                f"{path} has version {raw['version']!r}; this Pyper reads {VERSION}",
                hint="it was written by another version of Pyper, or is damaged",
            )
        files = {n: FileEntry(int(f["size"]), str(f["sha256"])) for n, f in raw["files"].items()}
        manifest = Manifest(files, dict(raw["metadata"]))
        unchanged = _serialise(manifest) == content
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _damaged(path, "it is not a manifest") from None
    if not unchanged:
        raise _damaged(path, "it does not match its own sha256")
    for name in files:
        _refuse_escapes(path, name)
    return manifest


def _check_size(folder: Path, name: str, entry: FileEntry) -> None:
    _refuse_links(folder, name)
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{path} is missing", hint="it is listed in the manifest")
    if path.stat().st_size != entry.size:
        raise _damaged(path, f"{path.stat().st_size:,} bytes, {entry.size:,} expected")


def _refuse_escapes(manifest: Path, name: str) -> None:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise CheckpointError(
            f"{manifest} lists `{name}`, which is not inside its folder",
            hint="do not use this folder: somebody made it to reach other files",
        )


def _refuse_links(folder: Path, name: str) -> None:
    path = folder
    for part in PurePosixPath(name).parts:
        path = path / part
        if path.is_symlink():
            raise CheckpointError(
                f"{path} is a symbolic link, which a checkpoint never holds",
                hint="copy the file itself into the folder",
            )


def _files_of(folder: Path) -> list[str]:
    names = []
    for root, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            inside = (Path(root) / name).relative_to(folder).as_posix()
            _refuse_links(folder, inside)
            if name in files and inside != MANIFEST:
                names.append(inside)
    return sorted(names)


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged: {why}", hint="use another checkpoint, or copy this one again"
    )
