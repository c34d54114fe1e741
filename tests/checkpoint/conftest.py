import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE, Popen, run
from textwrap import dedent

import pytest

# A process of its own that saves; {body} decides how it dies.
SAVER = """
import os, signal, sys
from pathlib import Path
import torch
from pyper.checkpoint import CheckpointStore, folder_lock
store = CheckpointStore(Path(sys.argv[1]), keep_last=1)
weights = {{"w": torch.full((1000,), 2.0)}}
state = {{"w.step": torch.tensor(2.0)}}
{body}
"""


@pytest.fixture
def python_process() -> Callable[[str, Path], tuple[int, str]]:
    """Run a body in a fresh interpreter on a folder; gives exit status and stderr."""

    def call(body: str, folder: Path) -> tuple[int, str]:
        code = SAVER.format(body=dedent(body))
        done = run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
        return done.returncode, done.stderr

    return call


@pytest.fixture
def background() -> Callable[[str, Path], Popen[str]]:
    """Start a body in a fresh interpreter; it must print `ready`, which this waits for."""

    def start(body: str, folder: Path) -> Popen[str]:
        code = SAVER.format(body=dedent(body))
        process = Popen([sys.executable, "-c", code, str(folder)], stdout=PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        return process

    return start
