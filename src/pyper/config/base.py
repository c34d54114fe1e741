"""The base of every section of a run file."""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pyper.config.explain import explain


class Section(BaseModel):
    """Frozen, and an unknown key is an error instead of a silent default."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def __init__(self, **values: Any) -> None:
        """Raises ConfigError, with the nearest name where one is misspelt."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            name = type(self).__name__
            raise explain(type(self), error, f"in `{name}(…)`") from None

    # Or pydantic would call it for every section inside another one, whose messages then lacked
    # the path to it.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]
