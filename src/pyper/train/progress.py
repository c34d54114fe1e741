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

    def close(self) -> None:
        """Nothing more comes."""


class Silent:
    """Says nothing."""

    def start(self, name: str, total_steps: int, step: int) -> None: ...

    def update(self, record: dict[str, Any]) -> None: ...

    def warn(self, message: str) -> None: ...

    def finish(self, name: str, step: int, loss: float) -> None: ...

    def close(self) -> None: ...


def new_bars(console: Console) -> RichProgress:
    """Bars with name, steps, numbers and time left."""
    return RichProgress(
        TextColumn("{task.description:>14}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(compact=True),
        console=console,
    )


class ProgressBar:
    """One line per expert: step, loss, validation, rate, tokens per second, MFU, time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = new_bars(console)
        self._task: TaskID | None = None
        self._latest: dict[str, Any] = {}

    def start(self, name: str, total_steps: int, step: int) -> None:
        """Show a new bar."""
        self._latest = {}
        self._bars = new_bars(self._console)
        self._task = self._bars.add_task(name, total=total_steps, completed=step, numbers="")
        self._bars.start()

    def update(self, record: dict[str, Any]) -> None:
        """Move the bar and show the newest numbers."""
        self._latest |= record
        if self._task is not None:
            self._bars.update(self._task, completed=record["step"], numbers=describe(self._latest))

    def warn(self, message: str) -> None:
        """Print above the bar."""
        self._console.print(f"[yellow]warning:[/] {message}", highlight=False)

    def finish(self, name: str, step: int, loss: float) -> None:
        """Leave the finished line standing."""
        self._bars.stop()

    def close(self) -> None:
        """End the bar of an interrupted run."""
        self._bars.stop()


def describe(record: dict[str, Any]) -> str:
    """The numbers of a line of `metrics.jsonl`, for a progress bar."""
    shown = []
    if "loss" in record:
        shown.append(f"loss {record['loss']:.3f} lr {record['learning_rate']:.1e}")
    if "valid_loss" in record:
        shown.append(f"valid {record['valid_loss']:.3f}")
    if "tokens_per_second" in record:
        shown.append(f"{record['tokens_per_second'] / 1000:,.1f}k tok/s")
    if "mfu" in record:
        shown.append(f"MFU {record['mfu']:.0%}")
    return " ".join(shown)
