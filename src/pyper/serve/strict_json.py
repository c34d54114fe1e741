"""JSON as the standard means it; what parsers disagree about is refused.

Python's parser accepts duplicate keys (the last one wins), NaN, infinities (also as `1e999`) and
lone surrogates, which no UTF-8 encoder can write back.
"""

import json
import math
from typing import Any

from pyper.serve.api_error import bad_request

MAX_DEPTH = 32
"""Of objects and arrays within each other; no known request needs more than six."""
_MAX_DIGITS = 19
"""Of an integer; 2⁶³ has as many."""
_SHOWN = 40


def parse_object(body: bytes) -> dict[str, Any]:
    """The one JSON object that `body` holds. Raises ApiError 400 naming what is wrong."""
    text = _decode(body)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_float=_finite,
            parse_int=_short,
            parse_constant=_no_constant,
        )
    except json.JSONDecodeError as error:
        raise bad_request(f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise _too_deep() from None
    if not isinstance(value, dict):
        raise bad_request("the body must be a JSON object")
    _check_depth(value)
    if "\\u" in text:
        _check_characters(value)
    return value


def _decode(body: bytes) -> str:
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise bad_request(f"the body is not UTF-8: byte {error.start}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise bad_request(f"the key `{_short_text(twice)}` occurs twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise bad_request(f"the number {text[:_SHOWN]} is too large")
    return number


def _short(text: str) -> int:
    if len(text.lstrip("-")) > _MAX_DIGITS:
        raise bad_request(f"the integer {text[:_SHOWN]}… has too many digits")
    return int(text)


def _no_constant(name: str) -> Any:
    raise bad_request(f"{name} is not a JSON number")


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise _too_deep()
        depth += 1
        containers = (item for item in level if isinstance(item, dict | list))
        level = [x for c in containers for x in (c.values() if isinstance(c, dict) else c)]


def _too_deep() -> Exception:
    return bad_request(f"the body is nested deeper than {MAX_DEPTH} levels")


def _check_characters(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise bad_request("a string holds half a surrogate pair (\\ud800 … \\udfff)") from None


def _short_text(text: str) -> str:
    return ascii(text[:_SHOWN])[1:-1]
