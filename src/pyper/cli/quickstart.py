"""`pyper quickstart`."""

from pathlib import Path
from typing import Annotated

import typer

from pyper.cli.output import JsonOption, SetOption, print_json, stderr, stdout


def quickstart(
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder.")] = Path(
        "runs/quickstart"
    ),
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """The whole pipeline on text that this machine already has: about three minutes.

    Harvests eight domains from the installed packages, trains a seed, eight experts and the dense
    control, fits the router, evaluates, and writes from each domain. Downloads nothing.

    Example: `pyper quickstart`
    """
    from pyper.stages.quickstart import print_result, run_quickstart

    result = run_quickstart(output, overrides or (), stderr())
    if as_json:
        print_json(result.as_json())
    else:
        print_result(result, stdout())
