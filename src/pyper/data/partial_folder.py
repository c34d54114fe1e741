"""A folder that appears whole or not at all."""

import errno
import glob
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyper.errors import StorageError


@contextmanager
def partial_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its name when all went well, and else is removed."""
    prefix = f".{output.name}.partial-{socket.gethostname()}-"
    folder = output.parent / f"{prefix}{os.getpid()}"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(output.parent, prefix)
        folder.mkdir()
        yield folder
        if output.is_dir():
            output.rmdir()  # empty, as `_finished` found
        folder.rename(output)
    except OSError as error:  # the readers turn theirs into a DataError
        hint = "free some space, or choose a folder you may write to"
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            hint = "something else wrote there meanwhile: run it again, or choose another folder"
        raise StorageError(
            f"cannot write {output}: {error.strerror or error}", hint=hint
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove what killed runs on this machine left behind."""
    if os.name != "posix":  # elsewhere signal 0 would end the process
        return
    for folder in parent.glob(f"{glob.escape(prefix)}*"):
        try:
            os.kill(int(folder.name.removeprefix(prefix)), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (ValueError, PermissionError):
            continue
