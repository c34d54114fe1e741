"""`pyper inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from pyper.cli.output import JsonOption, print_json, stdout


def inspect(
    path: Annotated[Path, typer.Argument(help="A run, mixture, data folder or checkpoint.")],
    as_json: JsonOption = False,
) -> None:
    """Say what a folder is, and verify every hash in it; exits 1 when one differs.

    Example: `pyper inspect runs/quickstart`
    """
    from pyper.stages.inspect import facts_table, inspect_path

    facts = inspect_path(path)
    if as_json:
        print_json(facts)
    else:
        stdout().print(facts_table(facts))
    if facts["damaged"]:
        raise typer.Exit(1)
