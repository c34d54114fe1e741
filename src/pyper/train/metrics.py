"""`metrics.jsonl`, and the trackers that may run beside it."""

import json
import os
from pathlib import Path
from typing import Any, Protocol

from pyper.config import TrackConfig
from pyper.errors import MissingExtraError

Record = dict[str, Any]


class Sink(Protocol):
    """Where numbers go."""

    def write(self, record: Record) -> None:
        """Take one record; `step` is always among its keys."""

    def close(self) -> None:
        """Flush and let go."""


class MetricsFile:
    """One JSON object per line; a resumed run continues after its checkpoint's step."""

    def __init__(self, path: Path, resume_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _read_lines(path) if json.loads(line)["step"] <= resume_step]
        # Beside the old file, then in its place: a kill must not lose what was logged.
        temporary = path.with_name(f".tmp-{path.name}")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append one record."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _read_lines(path: Path) -> list[str]:
    """Whole lines only: a killed process may have left half of one."""
    if not path.is_file():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(True) if line[-1:] == "\n"]


def read_metrics(path: Path) -> list[Record]:
    """All records of a `metrics.jsonl`."""
    return [json.loads(line) for line in _read_lines(path)]


def read_last_record(path: Path) -> Record:
    """The newest numbers of a `metrics.jsonl` (its last lines together); empty without one."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            tail = file.read().decode("utf-8", errors="ignore").splitlines(True)[-3:]
    except OSError:
        return {}
    record: Record = {}
    for line in tail:
        if line.startswith("{") and line.endswith("\n"):
            record |= json.loads(line)
    return record


class TensorBoardSink:
    """Scalars for TensorBoard."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingExtraError(
                "tensorboard", extra="track", needed_for="`track.tensorboard`"
            ) from None
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, record: Record) -> None:
        """Write every number of a record under its key."""
        for key, value in record.items():
            if isinstance(value, int | float) and key != "step":
                self._writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        """Flush to disk."""
        self._writer.close()


class WandbSink:
    """Records for Weights & Biases."""

    def __init__(self, project: str, folder: Path, name: str) -> None:
        try:
            import wandb
        except ImportError:
            raise MissingExtraError("wandb", extra="track", needed_for="`track.wandb`") from None
        self._run = wandb.init(project=project, name=name, dir=str(folder), resume="allow")

    def write(self, record: Record) -> None:
        """Log one record."""
        self._run.log(record, step=record["step"])

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def open_sinks(folder: Path, name: str, track: TrackConfig, resume_step: int) -> list[Sink]:
    """`metrics.jsonl` always, and what `[track]` asks for."""
    trackers: list[Sink] = []  # first: one that is not installed must leave no file open
    if track.tensorboard:
        trackers.append(TensorBoardSink(folder))
    if track.wandb is not None:
        trackers.append(WandbSink(track.wandb, folder, name))
    return [MetricsFile(folder / "metrics.jsonl", resume_step), *trackers]
