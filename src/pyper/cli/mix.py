"""`pyper mix`."""

from pathlib import Path
from typing import Annotated

import typer

from pyper.cli.exclusive import refuse_beside
from pyper.cli.output import JsonOption, SetOption, print_json, stderr, stdout


def mix(
    context: typer.Context,
    run_file: Annotated[Path, typer.Argument(help="Run file, run folder, or a mixture.")],
    drop: Annotated[
        list[str] | None, typer.Option(help="Leave out this expert. Needs --output.")
    ] = None,
    add: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=RUN:EXPERT",
            help="Add another run's expert, e.g. poems=runs/verse:2. Needs --output.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the changed mixture.")
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Join trained experts into `mixture/`, or add and drop experts without training.

    Example: `pyper mix runs/mine --drop law --add poems=runs/verse:2 -o mixtures/new`
    """
    if drop or add or output:
        option = "--drop" if drop else "--add" if add else "--output"
        refuse_beside(context, option, "overrides")
        from pyper.stages.change import change_mixture

        settings = change_mixture(run_file, output, drop or [], add or [])
        path = output
    else:
        from pyper.config import load_run
        from pyper.mixture.store import read_settings
        from pyper.stages.assign import assign
        from pyper.stages.context import open_context
        from pyper.stages.mix import mix as join

        run = open_context(load_run(run_file, overrides or ()), stderr())
        path = join(run, assign(run))
        settings = read_settings(path)
    if as_json:
        print_json({"path": str(path), **settings.model_dump(mode="json")})
    else:
        stdout().print(
            f"{path}: {settings.n_experts} expert{'s' if settings.n_experts > 1 else ''} "
            f"({', '.join(settings.experts)}), "
            f"{settings.mixing}, temperature {settings.temperature}"
        )
