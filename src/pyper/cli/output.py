"""Results on stdout, everything else on stderr."""

import errno
import json
import os
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from pyper.errors import PyperError, StorageError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout instead of tables.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one setting, e.g. train.epochs=2."),
]


def stderr() -> Console:
    """For progress, warnings and errors."""
    return Console(stderr=True)


def stdout() -> Console:
    """For results."""
    return Console()


def print_json(value: Any) -> None:
    """One JSON object, and nothing else, on stdout. Raises StorageError where it is full."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader has seen enough
        raise
    except OSError as error:
        raise unwritten(error) from None


def unwritten(error: OSError) -> StorageError:
    """Of results that stdout does not take; it is left alone from then on."""
    # What is still buffered would be written again, and fail again, when Python ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return StorageError(
        f"the result cannot be written: {error.strerror}",
        hint="send it to a file on a disk with room",
    )


def report_error(error: PyperError) -> None:
    """What is wrong, and what to do; no traceback."""
    console = stderr()
    lines = {"[bold red]error:[/]": error.message, "[bold]hint:[/]": error.hint}
    for label, text in lines.items():
        if text:  # a terminal breaks long lines itself, and copies them whole
            console.print(f"{label} {_plain(text)}", highlight=False, soft_wrap=True)


def _plain(text: str) -> str:
    """Square brackets of run files are not markup."""
    return text.replace("[", "\\[")
