"""`pyper train`."""

from pathlib import Path
from typing import Annotated

import typer

from pyper.cli.exclusive import refuse_beside
from pyper.cli.output import JsonOption, SetOption, print_json, stderr, stdout
from pyper.cli.ranges import settings_of


def train(
    context: typer.Context,
    run_file: Annotated[
        Path, typer.Argument(help="Run file, a run folder, or a shipped name such as `small`.")
    ],
    only: Annotated[
        list[str] | None,
        typer.Option(help="One part: `seed`, `control`, `expert:3`, `expert:law`. Repeatable."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Parts trained at the same time (default: `run.jobs`).")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show the resolved run and what it needs, and stop."),
    ] = False,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train everything that is missing: seed, experts, control, router; then evaluate.

    What is complete is skipped, what was interrupted goes on. `--only` trains one part, on any
    machine that sees the run folder.

    Example: `pyper train my-run.toml --set train.epochs=2 --jobs 2`
    """
    if only:  # what it names is trained one after another
        refuse_beside(context, "--only", "jobs", "dry_run")
    from pyper.config import load_run
    from pyper.config.run import RunSection

    if jobs is not None:
        settings_of(RunSection, {"jobs": jobs})
    extra = [f"run.jobs={jobs}"] if jobs is not None else []
    run = load_run(run_file, [*(overrides or ()), *extra])
    if dry_run:
        from pyper.stages.plan import plan, plan_table

        planned = plan(run)
        if as_json:
            print_json(planned)
        else:
            stdout().print(plan_table(planned))
        return
    from pyper.evaluate import domains_table, results_table
    from pyper.stages.context import open_context
    from pyper.stages.pipeline import run_pipeline, train_only

    opened = open_context(run, stderr())
    if only:
        results = train_only(opened, only)
        if as_json:
            print_json({"trained": results})
        else:
            for result in results:
                stdout().print(
                    f"{result['name']}: {result['steps']} steps, "
                    f"validation {result['loss']:.3f} nats per token"
                )
        return
    report = run_pipeline(opened)
    if as_json:
        print_json(report)
    else:
        stdout().print(results_table(report), domains_table(report))
