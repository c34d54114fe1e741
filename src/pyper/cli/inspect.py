"""`pyper inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from pyper.cli.exclusive import refuse_without
from pyper.cli.output import JsonOption, print_json, stdout


def inspect(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="A run, mixture, data folder or checkpoint.")],
    as_plan: Annotated[
        bool, typer.Option("--plan", help="PATH is a run file: what training it needs.")
    ] = False,
    mfu: Annotated[
        float, typer.Option(help="With --plan: share of the peak that is reached.")
    ] = 0.5,
    tflops: Annotated[
        float, typer.Option(help="With --plan: the device's peak, dense bf16 (H100, H200: 989).")
    ] = 989.0,
    as_json: JsonOption = False,
) -> None:
    """Say what a folder is, and verify every hash in it; exits 1 when one differs.

    Example: `pyper inspect runs/quickstart`, or `pyper inspect --plan 8x1b5`
    """
    if as_plan:
        _plan(path, mfu, tflops, as_json)
        return
    refuse_without(context, "--plan", "mfu", "tflops")
    from pyper.stages.inspect import facts_table, inspect_path

    facts = inspect_path(path)
    if as_json:
        print_json(facts)
    else:
        stdout().print(facts_table(facts))
    if facts["damaged"]:
        raise typer.Exit(1)


def _plan(run_file: Path, mfu: float, tflops: float, as_json: bool) -> None:
    from pyper.config import load_run
    from pyper.stages.plan import needs_table, plan, step_plan

    planned = plan(load_run(str(run_file)))
    planned["step"] = step_plan(planned, mfu, tflops * 1e12)
    if as_json:
        print_json(planned)
    else:
        stdout().print(needs_table(planned))
