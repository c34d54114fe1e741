"""Options that mean nothing beside others: refused, not passed over in silence."""

import typer

from pyper.errors import UsageError


def refuse_beside(context: typer.Context, option: str, *names: str) -> None:
    """Refuse those of the parameters `names` that were typed beside `option`.

    Raises UsageError.
    """
    for name in names:
        if _was_typed(context, name):
            raise UsageError(
                f"`{option}` does not go with `{_as_typed(context, name)}`",
                hint="leave one of them out",
            )


def refuse_without(context: typer.Context, option: str, *names: str) -> None:
    """Refuse those of the parameters `names` that were typed without `option`.

    Raises UsageError.
    """
    for name in names:
        if _was_typed(context, name):
            raise UsageError(
                f"`{_as_typed(context, name)}` goes with `{option}` only",
                hint="add that, or leave it out",
            )


def _was_typed(context: typer.Context, name: str) -> bool:
    """Also where the value is the default's."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _as_typed(context: typer.Context, name: str) -> str:
    return next(max(p.opts, key=len) for p in context.command.params if p.name == name)
