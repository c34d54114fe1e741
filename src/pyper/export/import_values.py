"""Values of a config.json, of the right type or refused by name."""

from collections.abc import Mapping
from typing import Any

from pyper.errors import ConfigError
from pyper.export.families import Family

ABSENT: Any = object()
_MOST_LAYERS = 4096
_LARGEST_NUMBER = 1e30


class ConfigReader:
    """Values of the right type, or the family's defaults."""

    def __init__(self, values: Mapping[str, Any], family: Family) -> None:
        self.values, self.family = values, family

    def get(self, key: str) -> Any:
        """As it stands; the family's default where it does not."""
        value = self.values.get(key, ABSENT)
        return self.family.default(key) if value is ABSENT else value

    def count(self, key: str) -> int:
        """A whole number from 1, which must be there."""
        value = self.values.get(key, ABSENT)
        if value is ABSENT and key == "max_position_embeddings":
            value = self.family.default(key)
        if value is ABSENT:
            raise ConfigError(f"config.json lacks `{key}`", hint="download the model again")
        # Lists are made as long as there are layers, before the weights say how many there are.
        most = _MOST_LAYERS if key == "num_hidden_layers" else 2**31 - 1
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise refused(key, value, f"it must be a whole number in 1 … {most:,}")
        return value

    def optional_count(self, key: str) -> int | None:
        """The same, where null and absence have a meaning."""
        value = self.get(key)
        return None if value is None else ConfigReader({key: value}, self.family).count(key)

    def number(self, key: str) -> float:
        """A positive number."""
        value = self.get(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value < _LARGEST_NUMBER:
            raise refused(key, value, "it must be a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false; null is false."""
        value = self.get(key)
        if not isinstance(value, bool | None):
            raise refused(key, value, "it must be true or false")
        return bool(value)


def refused(key: str, value: Any, why: str) -> ConfigError:
    """The error for a value that the model cannot be built with."""
    return ConfigError(
        f"`{key}` in config.json is {short(value)}: {why}",
        hint="this model cannot be taken over exactly; docs/import-export.md lists what can",
    )


def short(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
