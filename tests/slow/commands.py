"""`pyper` in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def start_pyper(*arguments: object, cwd: Path, **variables: str) -> subprocess.Popen[str]:
    """Begin a command; `variables` are added to the environment."""
    return subprocess.Popen(
        [sys.executable, "-m", "pyper.cli.main", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=os.environ | variables,
    )


def json_of(*arguments: object, cwd: Path, **variables: str) -> Any:
    """Run a command with `--json` to its end; the one object it prints."""
    process = start_pyper(*arguments, "--json", cwd=cwd, **variables)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert "Traceback" not in stderr
    return json.loads(stdout)
