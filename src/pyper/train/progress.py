"""What a person sees while experts train. All of it goes to stderr."""

from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress


class Progress(Protocol):
    """Told how training goes."""

    def start(self, name: str, total_steps: int, step: int) -> None:
        """An expert begins, or goes on at `step`."""

    def update(self, record: dict[str, Any]) -> None:
        """A line of `metrics.jsonl`."""

    def warn(self, message: str) -> None:
        """Something the user should know."""

    def finish(self, name: str, step: int, loss: float) -> None:
        """An expert is done, with this validation loss."""


class Silent:
    """Says nothing."""

    def start(self, name: str, total_steps: int, step: int) -> None: ...

    def update(self, record: dict[str, Any]) -> None: ...

    def warn(self, message: str) -> None: ...

    def finish(self, name: str, step: int, loss: float) -> None: ...


class ProgressBar:
    """One line per expert: step, loss, validation, rate, tokens per second, MFU, time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = RichProgress(
            TextColumn("{task.description:>12}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self._task: TaskID | None = None
        self._shown: dict[str, str] = {}

    def start(self, name: str, total_steps: int, step: int) -> None:
        """Show a new bar."""
        self._shown = {}
        self._task = self._bar.add_task(name, total=total_steps, completed=step, numbers="")
        self._bar.start()

    def update(self, record: dict[str, Any]) -> None:
        """Move the bar and show the newest numbers."""
        self._shown |= _describe(record)
        if self._task is not None:
            numbers = " ".join(self._shown.values())
            self._bar.update(self._task, completed=record["step"], numbers=numbers)

    def warn(self, message: str) -> None:
        """Print above the bar."""
        self._console.print(f"[yellow]warning:[/] {message}", highlight=False)

    def finish(self, name: str, step: int, loss: float) -> None:
        """Leave the finished line standing."""
        if self._task is not None:
            self._bar.update(self._task, completed=step)
        self._bar.stop()
        self._bar = RichProgress(*self._bar.columns, console=self._console)


def _describe(record: dict[str, Any]) -> dict[str, str]:
    shown = {}
    if "loss" in record:
        shown["loss"] = f"loss {record['loss']:.3f}"
        shown["rate"] = f"lr {record['learning_rate']:.1e}"
    if "valid_loss" in record:
        shown["valid"] = f"valid {record['valid_loss']:.3f}"
    if "tokens_per_second" in record:
        shown["speed"] = f"{record['tokens_per_second'] / 1000:,.1f}k tok/s"
    if "mfu" in record:
        shown["mfu"] = f"MFU {record['mfu']:.0%}"
    return shown
