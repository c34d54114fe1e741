"""`make bench`: without a GPU the scripts run a tiny shape, say so, and write their numbers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there they measure for minutes"),
]


@pytest.mark.parametrize("script", ["sparse_layer.py", "head_loss.py"])
def test_a_tiny_shape_is_measured_after_it_was_checked(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / script), "--json", str(tmp_path / "out.json")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert "No GPU here" in printed
    assert "errors against float64" in printed
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    measured = results.get("capacity 1", results)
    assert measured["rows"]["Pyper"]["ms"] > 0
    assert max(measured["errors"].values()) < 1e-5


def test_optimizers_are_checked_against_torch_before_they_are_timed(tmp_path: Path) -> None:
    script = [str(BENCHMARKS / "optimizer.py"), "--json", str(tmp_path / "out.json")]
    done = subprocess.run([sys.executable, *script], capture_output=True, text=True, check=True)

    assert "No GPU here" in done.stdout
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert max(results["errors"].values()) < 1e-5
    assert len(results["rows"]) == 10
    assert all(row["ms"] > 0 for row in results["rows"].values())
