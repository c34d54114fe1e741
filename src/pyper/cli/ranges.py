"""Values out of range are wrong usage, whoever finds them: typer, or what they are for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from pyper.errors import ConfigError, PromptError, UsageError

if TYPE_CHECKING:
    from pyper.config.base import Section

Settings = TypeVar("Settings", bound="Section")


@contextmanager
def options_in_range() -> Iterator[None]:
    """Around what checks the values of options. Raises UsageError in place of PromptError."""
    try:
        yield
    except PromptError as error:
        raise UsageError(error.message, hint=error.hint) from None


def settings_of(section: "type[Settings]", given: dict[str, Any]) -> Settings:
    """Options that are settings of the same names. Raises UsageError that names the wrong one."""
    from pyper.config.load import validate

    try:
        return validate(section, given)
    except ConfigError as error:
        name = error.message.split("`")[1].partition(".")[0].replace("_", "-")
        raise UsageError(error.message, hint=f"change `--{name}`") from None
