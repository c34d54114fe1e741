"""Two hundred clients for a minute; half of them leave, twenty hardly read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serve_load.py"


def test_a_minute_of_load_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--minutes", "1", "--json", str(tmp_path / "load.json")]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    results = json.loads((tmp_path / "load.json").read_text())["results"]
    assert results["answers_5xx"] == 0
    assert results["left_running"] == 0
    assert results["resident_growth"] < 0.05
    assert results["health_ms"]["p99"] < 100
    assert results["streams"]["reading: 200 whole"] > 200
    assert results["streams"]["leaving: 200 left"] > 50
    assert not [status for status in results["streams"] if "cut" in status or "refused" in status]
