"""Reading what strangers wrote: JSON of sane size, with errors that name the file."""

import json
from pathlib import Path
from typing import Any

from pyper.errors import CheckpointError

_LARGEST_JSON = 32 << 20


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError for anything else."""
    hint = "download the model again"
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise CheckpointError(f"{path} is larger than {_LARGEST_JSON >> 20} MiB", hint=hint)
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        words = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"{path} is not readable JSON: {words}", hint=hint) from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} holds no JSON object but a {type(value).__name__}", hint=hint
        )
    return value


def read_optional(path: Path) -> dict[str, Any]:
    """The same, or nothing where there is no such file."""
    return read_object(path) if path.exists() else {}
