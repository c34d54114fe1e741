"""What pydantic complains about, in one line and with a way out."""

import difflib
import re
from collections.abc import Sequence
from typing import get_args

from pydantic import BaseModel, ValidationError

from pyper.errors import ConfigError


def explain(model: type[BaseModel], error: ValidationError, where_to: str) -> ConfigError:
    """The first complaint in one line, and a hint: the nearest key, or `where_to` mend it."""
    first = error.errors(include_url=False)[0]
    where = [str(part) for part in first["loc"] if not _is_branch_of_union(part)]
    name = ".".join(where)
    if first["type"] == "extra_forbidden":
        return ConfigError(
            f"unknown key `{name}`", hint=nearest(where[-1], _keys_at(model, where[:-1]))
        )
    given = first["input"]
    shown = "" if isinstance(given, dict) else f", not {given!r}"
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    hint = f"mend `{name}` {where_to}"
    if first["type"] == "literal_error" and isinstance(given, str):
        known = re.findall("'([^']*)'", first["ctx"]["expected"])
        close = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
        hint = f"did you mean `{close[0]}`?" if close else hint
    return ConfigError(f"`{name}`: {message}{shown}", hint=hint)


def _is_branch_of_union(part: str | int) -> bool:
    """Pydantic puts the tried type into the location: `constrained-int`, `literal['auto']`."""
    return (isinstance(part, str) and any(mark in part for mark in "-[(")) or part in (
        "float",
        "int",
    )


def _keys_at(model: type[BaseModel], where: Sequence[str]) -> list[str]:
    for key in where:
        field = model.model_fields.get(key)
        if field is None:
            break
        options = [field.annotation, *get_args(field.annotation)]
        inner = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not inner:
            break
        model = inner[0]
    return list(model.model_fields)


def nearest(word: str, known: Sequence[str]) -> str:
    """«did you mean …?», or an empty string when nothing is close."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean `{close[0]}`?" if close else f"known: {', '.join(known[:40])}"
