"""Tasks of our own, in `tasks/`, and a measurement of a model on them."""

from pathlib import Path
from typing import Any

from rich.console import Console

from pyper.stages.harness import HarnessOptions, evaluate_tasks

TASKS = Path(__file__).parent / "tasks"


def measure(model: Path, *tasks: str, **options: Any) -> dict[str, Any]:
    """The result of `tasks`, by their names; nothing is shown."""
    files = [str(TASKS / f"{task}.yaml") for task in tasks]
    return evaluate_tasks(model, HarnessOptions(files, **options), Console(quiet=True))
