"""All stages of a run, in order; what is complete is skipped."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pyper.stages.assign import assign
from pyper.stages.assignment import ExpertData
from pyper.stages.context import Context
from pyper.stages.evaluate import evaluate
from pyper.stages.jobs import train_in_parallel
from pyper.stages.mix import mix
from pyper.stages.together import pays_together, train_together
from pyper.stages.train import Unit, finished_result, parse_unit, train_unit, units_of
from pyper.train import TrainResult
from pyper.train.progress import ProgressBar


def run_pipeline(context: Context) -> dict[str, Any]:
    """assign → train → mix → evaluate; returns `evaluation.json`."""
    assigned = assign(context)
    train_missing(context, assigned)
    mix(context, assigned)
    return evaluate(context)


def train_missing(context: Context, assigned: ExpertData) -> None:
    """Train every part that is not complete yet: the seed, then the rest, side by side or not."""
    first, rest = units_of(context)
    train_units(context, assigned, first)
    missing = [unit for unit in rest if finished_result(unit.folder(context)) is None]
    if len(missing) > 1 and pays_together(context, len(missing)):
        train_together(context, assigned, missing)
    elif context.run.run.jobs > 1 and len(missing) > 1:
        train_in_parallel(context, assigned, missing, min(context.run.run.jobs, len(missing)))
    else:
        train_units(context, assigned, missing)


def train_units(context: Context, assigned: ExpertData, units: Sequence[Unit]) -> list[TrainResult]:
    """Train some parts, one after another."""
    progress = ProgressBar(context.console)
    return [train_unit(context, assigned, unit, progress) for unit in units]


def train_only(context: Context, names: Sequence[str]) -> list[dict[str, Any]]:
    """Train the named parts (`seed`, `expert:3` …) and nothing else."""
    assigned = assign(context)
    units = [parse_unit(name, assigned.names) for name in names]
    return [asdict(result) for result in train_units(context, assigned, units)]
