"""Write the resolved run file. (The standard library reads TOML but does not write it.)"""

import json
import re
from typing import Any


def to_toml(values: dict[str, Any]) -> str:
    """TOML of nested dictionaries of strings, numbers, booleans, lists and tables."""
    lines: list[str] = []
    _write_table(values, (), lines)
    return "\n".join(lines).lstrip("\n") + "\n"


def _write_table(table: dict[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    plain = {k: v for k, v in table.items() if not isinstance(v, dict) and not _is_tables(v)}
    if path and (plain or not table):
        lines += ["", f"[{'.'.join(path)}]"]
    lines += [f"{_key(key)} = {_value(value)}" for key, value in plain.items()]
    for key, value in table.items():
        if isinstance(value, dict):
            _write_table(value, (*path, key), lines)
        elif _is_tables(value):
            for item in value:
                lines += ["", f"[[{'.'.join((*path, key))}]]"]
                lines += [f"{k} = {_value(v)}" for k, v in item.items()]


def _key(key: str) -> str:
    """Domains may be called anything; TOML wants quotes round what is not a bare word."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_value(v) for v in value) + "]"
    # Strings, numbers and booleans are written alike in JSON and TOML.
    return json.dumps(value, ensure_ascii=False)
