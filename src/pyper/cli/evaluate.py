"""`pyper evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from pyper.cli.output import JsonOption, SetOption, print_json, stderr, stdout


def evaluate(
    run_file: Annotated[Path, typer.Argument(help="Run file, or a run folder.")],
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a run on held-out text: the mixture in every mode beside the dense control.

    Example: `pyper evaluate runs/quickstart --set evaluate.tokens=100000`
    """
    from pyper.config import load_run

    run = load_run(run_file, overrides or ())
    from pyper.evaluate import domains_table, results_table
    from pyper.stages.context import open_context
    from pyper.stages.evaluate import evaluate as measure

    report = measure(open_context(run, stderr()))
    if as_json:
        print_json(report)
    else:
        stdout().print(results_table(report), domains_table(report))
