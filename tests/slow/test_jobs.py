"""`pyper train --jobs 2`: signals, killed workers and locked folders end all of it, saved."""

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import start_pyper

from pyper.checkpoint import CheckpointStore, folder_lock
from pyper.stages.toml import to_toml

pytestmark = pytest.mark.slow

EXPERTS = ("experts/00", "experts/01")


@pytest.fixture
def arguments(new_run: Callable[..., Any], tmp_path: Path) -> tuple[object, ...]:
    """A run that would take minutes, checkpoints only when it is stopped."""
    rare = ("train.eval_every=1000000", "train.control=false", "train.seed_fraction=0.00001")
    run = new_run(tmp_path / "run", "train.steps=100000", *rare)
    path = tmp_path / "mine.toml"
    path.write_text(to_toml(run.model_dump(mode="json", exclude_none=True)))
    return ("train", path, "--jobs", 2)


@pytest.fixture
def training(arguments: tuple[object, ...], tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """The command, once both experts train."""
    process = start_pyper(*arguments, cwd=tmp_path)
    logs = [tmp_path / "run" / e / "metrics.jsonl" for e in EXPERTS]
    deadline = time.monotonic() + 60
    while not all(log.is_file() and log.stat().st_size > 500 for log in logs):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield process
    process.kill()


def workers_of(process: "subprocess.Popen[str]") -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(c) for c in children if "spawn_main" in Path(f"/proc/{c}/cmdline").read_text()]


def are_gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}/cmdline").is_file() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def saved_steps(run: Path) -> list[int]:
    """The newest checkpoint of each expert, 0 where there is none."""
    return [CheckpointStore(run / expert).latest_step() or 0 for expert in EXPERTS]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_all_parts(
    training: "subprocess.Popen[str]", tmp_path: Path, number: int, code: int
) -> None:
    workers = workers_of(training)
    assert len(workers) == 2

    training.send_signal(number)
    _, stderr = training.communicate(timeout=30)

    assert training.returncode == code
    assert "state saved" in stderr
    assert "Traceback" not in stderr
    assert min(saved_steps(tmp_path / "run")) > 0
    assert are_gone(workers)


def test_when_a_worker_is_killed_the_other_saves(
    training: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    workers = workers_of(training)

    subprocess.run(["kill", "-9", str(workers[0])], check=True)
    _, stderr = training.communicate(timeout=30)

    assert training.returncode == 1
    assert "killed from outside" in stderr
    assert "Traceback" not in stderr
    assert max(saved_steps(tmp_path / "run")) > 0
    assert are_gone(workers)


def test_workers_do_not_outlive_a_killed_parent(training: "subprocess.Popen[str]") -> None:
    workers = workers_of(training)
    training.kill()
    training.communicate(timeout=30)
    assert are_gone(workers)


def test_a_part_that_another_process_trains_is_said_in_one_line(
    arguments: tuple[object, ...], tmp_path: Path
) -> None:
    with folder_lock(tmp_path / "run" / "experts" / "01"):
        process = start_pyper(*arguments, cwd=tmp_path, COLUMNS="400")
        _, stderr = process.communicate(timeout=60)

    assert process.returncode == 1
    assert "experts/01 is in use by process" in stderr
    assert "Traceback" not in stderr
    assert saved_steps(tmp_path / "run")[1] == 0
