"""`learning_rate = "auto"`."""

import io

import pytest
from rich.console import Console
from tiny_training import new_config, new_model

from pyper.train import TrainingData, learning_rate


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning_rate, "_STEPS", 12)
    monkeypatch.setattr(learning_rate, "_WARMUP", 2)
    monkeypatch.setattr(learning_rate, "_EVAL_TOKENS", 64)
    monkeypatch.setattr(learning_rate, "_FACTORS", (0.01, 10.0, 10_000.0))


@pytest.mark.usefixtures("one_thread")
def test_a_rate_between_standing_still_and_diverging_wins(training_data: TrainingData) -> None:
    output = io.StringIO()
    found = learning_rate.find_learning_rate(
        new_model, training_data, new_config(learning_rate="auto"), Console(file=output)
    )

    assert found["learning_rate"] == pytest.approx(1e-2)
    assert found["losses"].keys() == {"1.000e-05", "1.000e-02", "1.000e+01"}
    assert min(found["losses"].values()) == found["losses"]["1.000e-02"]
    assert "learning rate 1.0e-02" in output.getvalue()
