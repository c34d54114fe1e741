"""`pyper assign`."""

from pathlib import Path
from typing import Annotated

import typer

from pyper.cli.output import JsonOption, SetOption, print_json, stderr, stdout


def assign(
    run_file: Annotated[Path, typer.Argument(help="Run file, or a run folder.")],
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Divide the documents among the experts (the first stage of `train`, on its own).

    Example: `pyper assign my-run.toml --set mixture.n_experts=4`
    """
    from pyper.config import load_run

    run = load_run(run_file, overrides or ())
    from pyper.stages.assign import assign as divide
    from pyper.stages.assignment import assignment_summary, assignment_table
    from pyper.stages.context import open_context

    context = open_context(run, stderr())
    divide(context)
    if as_json:
        print_json(assignment_summary(context.folder.assignment))
    else:
        stdout().print(assignment_table(context.folder.assignment))
