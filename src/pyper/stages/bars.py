"""Bars of parts that train at the same time."""

import time
from collections.abc import Callable, Sequence

from rich.progress import Progress as Bars
from rich.progress import TaskID

from pyper.stages.assignment import ExpertData
from pyper.stages.context import Budget, Context
from pyper.stages.train import Unit, budget_of
from pyper.train.metrics import read_last_record
from pyper.train.progress import describe, new_bars

_POLL_SECONDS = 0.3


def watch(
    context: Context, assigned: ExpertData, units: Sequence[Unit], is_over: Callable[[], bool]
) -> None:
    """One bar per part, read from its `metrics.jsonl`, until `is_over`."""
    budget = budget_of(context, assigned)
    bars = new_bars(context.console)
    tasks = {
        unit: bars.add_task(unit.title(assigned), total=_steps(budget, unit), numbers="")
        for unit in units
    }
    with bars:
        while not is_over():
            _refresh(context, tasks, bars)
            time.sleep(_POLL_SECONDS)
        _refresh(context, tasks, bars)


def _steps(budget: Budget, unit: Unit) -> int:
    return budget.control if unit.kind == "control" else budget.experts[unit.index]


def _refresh(context: Context, tasks: dict[Unit, TaskID], bars: Bars) -> None:
    for unit, task in tasks.items():
        record = read_last_record(unit.folder(context) / "metrics.jsonl")
        if record:
            bars.update(task, completed=record["step"], numbers=describe(record))
