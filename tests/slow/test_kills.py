"""A run that is killed again and again ends as one that was left alone."""

import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import json_of, start_pyper

from pyper.checkpoint import load_checkpoint
from pyper.stages.toml import to_toml
from pyper.train.metrics import read_metrics

pytestmark = pytest.mark.slow

ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # bitwise comparisons need equal numbers of threads
PARTS = ("seed", "control", "experts/00", "experts/01")


@pytest.fixture
def run_file(new_run: Callable[..., Any], tmp_path: Path) -> Path:
    """Long enough to be killed often: a checkpoint after every other step, 4,500 steps in all."""
    settings = ("train.steps=3000", "train.eval_every=2", "mixture.assign=discover")
    run = new_run(tmp_path / "unset", *settings)
    path = tmp_path / "mine.toml"
    path.write_text(to_toml(run.model_dump(mode="json", exclude_none=True)))
    return path


def arguments_for(run_file: Path, name: str, jobs: int) -> tuple[object, ...]:
    return ("train", run_file, "--jobs", jobs, "--set", f"run.folder={run_file.parent / name}")


def kill_after(seconds: float, *arguments: object, cwd: Path) -> bool:
    """Whether the command was still running then."""
    process = start_pyper(*arguments, cwd=cwd, **ONE_THREAD)
    try:
        _, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return True
    assert process.returncode == 0, stderr
    return False


def losses_of(folder: Path) -> list[tuple[int, float | None, float | None]]:
    """What was logged; speeds differ."""
    records = read_metrics(folder / "metrics.jsonl")
    return [(r["step"], r.get("loss"), r.get("valid_loss")) for r in records]


@pytest.mark.parametrize(("jobs", "kills"), [(1, 20), (2, 10)])
def test_a_run_killed_again_and_again_ends_bit_for_bit_the_same(
    run_file: Path, tmp_path: Path, jobs: int, kills: int
) -> None:
    """With two jobs the workers must not outlive their parent: they would hold the locks."""
    undisturbed = json_of(*arguments_for(run_file, "whole", jobs), cwd=tmp_path, **ONE_THREAD)

    killed, rng = arguments_for(run_file, "killed", jobs), random.Random(0)
    n_kills = sum(kill_after(rng.uniform(0.5, 5), *killed, cwd=tmp_path) for _ in range(kills))
    survived = json_of(*killed, cwd=tmp_path, **ONE_THREAD)

    assert n_kills >= kills / 2
    for part in PARTS:
        one, two = (tmp_path / name / part for name in ("whole", "killed"))
        ours, theirs = (load_checkpoint(folder / "best").model for folder in (one, two))
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
        assert losses_of(one) == losses_of(two)
    assert survived == undisturbed
    assert json_of("inspect", tmp_path / "killed", cwd=tmp_path)["damaged"] == []
