"""`pyper evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from pyper.cli.output import JsonOption, SetOption, print_json, stderr, stdout


def evaluate(
    run_file: Annotated[Path, typer.Argument(help="Run file, or a run folder.")],
    leak_probe: Annotated[
        bool,
        typer.Option(
            "--leak-probe", help="Test whether the routing of a sparse model sees the future."
        ),
    ] = False,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a run on held-out text: the mixture in every mode beside the dense control.

    Example: `pyper evaluate runs/quickstart --set evaluate.tokens=100000`

    `--leak-probe` needs no data and no trained run: `pyper evaluate sparse --leak-probe`
    """
    from pyper.config import load_run

    run = load_run(run_file, overrides or ())
    if leak_probe:
        from pyper.stages.leak_probe import probe_run, probe_table

        result = probe_run(run.model, stderr())
        if as_json:
            print_json(result)
        else:
            stdout().print(probe_table(result))
        return
    from pyper.evaluate import domains_table, results_table
    from pyper.stages.context import open_context
    from pyper.stages.evaluate import evaluate as measure

    report = measure(open_context(run, stderr()))
    if as_json:
        print_json(report)
    else:
        stdout().print(results_table(report), domains_table(report))
