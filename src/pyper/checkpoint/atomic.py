"""Folders and files that exist completely or not at all, whenever the process dies.

A folder is written as `.tmp-NAME-…` beside its target, flushed to the disk, and renamed. The writer
holds a lock on the temporary folder, so that others can tell a live one from what a dead process
left behind. `.replaced-NAME-…` is a target that was moved out of the way of its successor, and
comes back if that never arrives; `.trash-NAME-…` is on its way out.
"""

import errno
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from pyper.checkpoint.manifest import FileEntry, Json, write_manifest
from pyper.errors import StorageError

_TMP, _TRASH, _REPLACED = ".tmp-", ".trash-", ".replaced-"
_HINTS = {
    errno.ENOSPC: "free some space or write to another disk; what was there before is intact",
    errno.EDQUOT: "your quota is used up; what was there before is intact",
    errno.EACCES: "choose a folder that you may write to, or change its permissions",
    errno.EPERM: "choose a folder that you may write to, or change its permissions",
    errno.EROFS: "this file system is read-only; choose another folder",
    errno.ENOTDIR: "a file is where a folder should be; choose another path",
    errno.EEXIST: "a file is where a folder should be; choose another path",
    errno.EFBIG: "the limit on file sizes (`ulimit -f`) or the file system's own is too low",
}


@contextmanager
def write_folder_atomically(
    target: Path,
    *,
    metadata: Mapping[str, Json] | None = None,
    needed_bytes: int = 0,
    known: Mapping[str, FileEntry] | None = None,
) -> Iterator[Path]:
    """Fill the folder that this gives; with a manifest it becomes `target` when the block succeeds.

    An existing target stays in place until its successor is safely on the disk. When the block
    raises, nothing of it remains. `known`, which the block may fill, saves hashing a file again.
    Raises StorageError when the disk is full or not writable.
    """
    with storage_errors(target, needed_bytes):
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent, target.name)
        check_free_space(target.parent, needed_bytes)
        temporary, lock = _open_temporary(target)
        try:
            yield temporary
            _flush_tree(temporary)
            write_manifest(temporary, metadata, known=known)
            _flush(temporary / "MANIFEST.json")
            _flush(temporary)
            _put_in_place(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            os.close(lock)


def write_json_atomically(path: Path, value: Json) -> None:
    """Write one JSON file, completely or not at all. Raises StorageError."""
    temporary = path.with_name(f"{_TMP}{path.name}-{uuid.uuid4().hex}")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w", encoding="utf-8") as file:
                _lock(file.fileno())
                json.dump(value, file, ensure_ascii=False, indent=1)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _flush(path.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder so that it is whole or gone, never half there."""
    trash = folder.with_name(f"{_TRASH}{folder.name}-{uuid.uuid4().hex}")
    with storage_errors(folder):
        os.rename(folder, trash)
        _flush(folder.parent)
    shutil.rmtree(trash, ignore_errors=True)


def sweep(folder: Path, name: str | None = None) -> None:
    """Clear what dead writers left in `folder` (of the target `name`, or of all).

    A live writer's folder is left alone, and so is everything where locks do not work.
    """
    left = [path for path in folder.iterdir() if name in (None, _target_name(path))]
    for path in left:
        if path.name.startswith(_TRASH):
            shutil.rmtree(path, ignore_errors=True)
    alive = {_target_name(p) for p in left if p.name.startswith(_TMP) and not _clear_dead(p)}
    for path in left:
        if path.name.startswith(_REPLACED) and _target_name(path) not in alive:
            _bring_back(path)


def check_free_space(folder: Path, needed_bytes: int) -> None:
    """Raise StorageError when the disk of `folder` has less than `needed_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise StorageError(
            f"{folder}: {format_bytes(needed_bytes)} needed, {format_bytes(free)} free",
            hint=_HINTS[errno.ENOSPC],
        )


@contextmanager
def storage_errors(path: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Turn the system's complaints about disks and permissions into StorageError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _HINTS:
            raise
        needs = f" ({format_bytes(needed_bytes)} needed)" if needed_bytes else ""
        raise StorageError(
            f"cannot write {path}: {error.strerror}{needs}{_free_at(path)}",
            hint=_HINTS[error.errno],
        ) from error


def format_bytes(n: int) -> str:
    """`1.5 GB`, in powers of 1000 as disks are sold."""
    value, unit = float(n), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def _free_at(path: Path) -> str:
    for folder in (path, *path.parents):
        with suppress(OSError):
            return f", {format_bytes(shutil.disk_usage(folder).free)} free"
    return ""


def _open_temporary(target: Path) -> tuple[Path, int]:
    """A new temporary folder and the open, locked descriptor that says its writer lives."""
    while True:
        path = target.with_name(f"{_TMP}{target.name}-{uuid.uuid4().hex}")
        path.mkdir()
        descriptor = os.open(path, os.O_RDONLY)
        _lock(descriptor)
        if path.exists():
            return path, descriptor
        os.close(descriptor)  # a sweep came between the two lines above


def _lock(descriptor: int) -> None:
    """Show that the writer lives; some network file systems cannot lock folders."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _clear_dead(path: Path) -> bool:
    """Remove a temporary file or folder whose writer is dead; says whether it did."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return not path.exists()
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _bring_back(replaced: Path) -> None:
    target = replaced.with_name(_target_name(replaced))
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        with suppress(OSError):  # somebody who may only read
            os.rename(replaced, target)


def _target_name(path: Path) -> str:
    """`NAME` of `.tmp-NAME-…` and its like; the name itself otherwise."""
    for prefix in (_TMP, _TRASH, _REPLACED):
        if path.name.startswith(prefix):
            return path.name.removeprefix(prefix).rpartition("-")[0]
    return path.name


def _put_in_place(temporary: Path, target: Path) -> None:
    replaced = target.with_name(f"{_REPLACED}{target.name}-{uuid.uuid4().hex}")
    existed = target.exists()
    if existed:
        os.rename(target, replaced)
    try:
        os.rename(temporary, target)
    except BaseException:
        if existed:
            os.rename(replaced, target)
        raise
    _flush(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _flush_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            _flush(Path(root) / name)
        _flush(Path(root))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
