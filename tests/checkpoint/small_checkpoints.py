"""Small checkpoints, and processes that save them (and die of it)."""

import sys
from pathlib import Path
from subprocess import PIPE, Popen, run
from textwrap import dedent

import torch

from pyper.checkpoint import CheckpointStore

PREAMBLE = """
import os, signal, sys
from pathlib import Path
import torch
from pyper.checkpoint import CheckpointStore, folder_lock
store = CheckpointStore(Path(sys.argv[1]), keep_last=1)
weights = {"w": torch.full((1000,), 2.0)}
state = {"w.step": torch.tensor(2.0)}
"""


def save(store: CheckpointStore, step: int, *, best: bool = False) -> Path:
    """A small checkpoint whose content tells its step."""
    weights = {"w": torch.full((300,), float(step)), "b": torch.arange(5).bfloat16()}
    return store.save(
        step, weights, {"exp_avg": torch.full((7,), float(step))}, {"position": step}, best=best
    )


def run_python(body: str, folder: Path) -> tuple[int, str]:
    """Run `body` in a fresh interpreter on a folder; gives exit status and stderr."""
    code = PREAMBLE + dedent(body)
    quiet = ["-W", "ignore::DeprecationWarning"]  # of forking
    done = run([sys.executable, *quiet, "-c", code, str(folder)], capture_output=True, text=True)
    return done.returncode, done.stderr


def start_python(body: str, folder: Path) -> Popen[str]:
    """Start `body` in a fresh interpreter; it must print `ready`, which this waits for."""
    code = PREAMBLE + dedent(body)
    process = Popen([sys.executable, "-c", code, str(folder)], stdout=PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready"
    return process
