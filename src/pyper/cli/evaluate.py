"""`pyper evaluate`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pyper.cli.exclusive import refuse_beside, refuse_without
from pyper.cli.output import JsonOption, SetOption, print_json, stderr, stdout


def evaluate(
    context: typer.Context,
    run_file: Annotated[
        Path,
        typer.Argument(help="Run file, or a run folder; with --tasks also a mixture or model."),
    ],
    leak_probe: Annotated[
        bool,
        typer.Option(
            "--leak-probe", help="Test whether the routing of a sparse model sees the future."
        ),
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="A,B.yaml",
            help="Tasks of lm-evaluation-harness instead: names, or files of your own.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="With --tasks: documents of each (default: all).")
    ] = None,
    fewshot: Annotated[
        int | None, typer.Option(min=0, help="With --tasks: examples before each question.")
    ] = None,
    mixing: Annotated[
        str | None,
        typer.Option(help="With --tasks: posterior, top1 or window instead of the saved mode."),
    ] = None,
    expert: Annotated[
        str | None, typer.Option(help="With --tasks: one expert alone, its name or number.")
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="With --tasks: tokens read at a time (8192).")
    ] = None,
    device: Annotated[str | None, typer.Option(help="With --tasks: cpu, cuda … (auto).")] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a run on held-out text: the mixture in every mode beside the dense control.

    Example: `pyper evaluate runs/quickstart --set evaluate.tokens=100000`

    `--tasks` measures a saved model with lm-evaluation-harness (`pip install 'pyper[eval]'`):
    `pyper evaluate runs/quickstart --tasks arc_easy,my-task.yaml --limit 100`

    `--leak-probe` needs no data and no trained run: `pyper evaluate sparse --leak-probe`
    """
    of_tasks = {
        "limit": limit,
        "fewshot": fewshot,
        "mixing": mixing,
        "expert": expert,
        "batch_tokens": batch_tokens,
        "device": device,
    }
    if tasks is not None:
        refuse_beside(context, "--tasks", "leak_probe", "overrides")
        given = {name: value for name, value in of_tasks.items() if value is not None}
        _evaluate_tasks(run_file, tasks, given, as_json)
        return
    refuse_without(context, "--tasks", *of_tasks)
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


def _evaluate_tasks(model: Path, tasks: str, given: dict[str, Any], as_json: bool) -> None:
    from pyper.stages.harness import HarnessOptions, evaluate_tasks, harness_table, split_names

    result = evaluate_tasks(model, HarnessOptions(split_names(tasks), **given), stderr())
    if as_json:
        print_json(result)
    else:
        stdout().print(harness_table(result))
