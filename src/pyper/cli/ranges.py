"""Values out of range are wrong usage, whoever finds them: typer, or what they are for."""

from collections.abc import Iterator
from contextlib import contextmanager

from pyper.errors import PromptError, UsageError


@contextmanager
def options_in_range() -> Iterator[None]:
    """Around what checks the values of options. Raises UsageError in place of PromptError."""
    try:
        yield
    except PromptError as error:
        raise UsageError(error.message, hint=error.hint) from None
