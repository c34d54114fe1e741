"""One writer per folder."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyper.checkpoint.atomic import storage_errors
from pyper.errors import LockedError, StorageError

_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold `folder/.lock`; the kernel frees it when the process ends, however it ends.

    Raises LockedError at once, naming the holder, when another process (or this one) has it, and
    StorageError where the folder cannot be written or its file system cannot lock.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _take(descriptor, folder)
        # only information: the lock is the kernel's, a left-over file means nothing
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 300, 0).decode(errors="replace").strip()
        raise LockedError(
            f"{folder} is in use by {holder or 'another process'}",
            hint="wait for it or stop it, or choose another folder",
        ) from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        raise StorageError(
            f"{folder} is on a file system without locks ({error.strerror})",
            hint="choose a folder on a local disk, or mount the file system with locking",
        ) from None
