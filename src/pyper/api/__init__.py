"""Pyper from Python; the names are those at the top of `pyper`."""

from pyper.api.commands import (
    evaluate_run,
    evaluate_tasks,
    merge_run,
    prepare,
    train_expert,
    train_run,
)
from pyper.api.model import Model, Score, load

__all__ = [
    "Model",
    "Score",
    "evaluate_run",
    "evaluate_tasks",
    "load",
    "merge_run",
    "prepare",
    "train_expert",
    "train_run",
]
