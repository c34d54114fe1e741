"""All parts of a run at once in one process."""

import os
import signal
from pathlib import Path

import pytest
import torch
from run_files import Open

from pyper.checkpoint import load_checkpoint
from pyper.config import DataConfig, ExpertConfig, RunConfig, TrainConfig
from pyper.errors import ConfigError, InterruptedRun, NonFiniteError
from pyper.stages import together
from pyper.stages.assign import assign
from pyper.stages.context import Context
from pyper.stages.pipeline import run_pipeline, train_missing, train_only
from pyper.stages.together import is_small, pays_together, train_together
from pyper.stages.train import Unit, finished_result
from pyper.train.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")

PARTS = ("seed", "control", "experts/00", "experts/01")
AT_ONCE = "run.parallel_experts=true"


def losses(folder: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]


def test_experts_trained_together_are_those_trained_one_by_one(
    open_new: Open, finished_run: Path, tmp_path: Path
) -> None:
    run_pipeline(open_new("together", AT_ONCE))
    for part in PARTS:
        ours, theirs = (
            load_checkpoint(f / part / "best").model for f in (tmp_path / "together", finished_run)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        expected = losses(finished_run / part)
        assert losses(tmp_path / "together" / part) == pytest.approx(expected, rel=1e-5)


def test_each_expert_keeps_its_own_rate_and_early_stop(open_new: Open, tmp_path: Path) -> None:
    stop_at_once = {"patience": 1, "min_delta": 5.0}
    context = open_new(
        "own",
        AT_ONCE,
        "train.steps=16",
        expert=[
            {"index": 0, "early_stopping": stop_at_once},
            {"index": 1, "learning_rate": 1e-5},
        ],
    )
    train_missing(context, assign(context))
    first, second = (finished_result(context.folder.expert(i)) for i in range(2))
    assert first is not None
    assert first.stopped_early
    assert second is not None
    assert not second.stopped_early
    records = [read_metrics(context.folder.expert(i) / "metrics.jsonl") for i in range(2)]
    rates = [max(r.get("learning_rate", 0.0) for r in own) for own in records]
    assert rates[1] == pytest.approx(1e-5)
    assert rates[0] > 1e-4


def test_a_signal_stops_all_with_their_state_saved_and_they_go_on(
    open_new: Open, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = open_new("stopped", AT_ONCE, "run.random_seed=0")
    assigned = assign(context)
    train_only(context, ["seed"])
    usual = together.train_unit

    def signalled(context: Context, assigned: object, unit: Unit, *rest: object) -> object:
        """SIGTERM comes while the experts begin."""
        if unit.index == 0:  # once: a second signal would end the process
            os.kill(os.getpid(), signal.SIGTERM)
        return usual(context, assigned, unit, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(together, "train_unit", signalled)
    units = [Unit("expert", 0), Unit("expert", 1)]
    with pytest.raises(InterruptedRun, match="state saved") as caught:
        train_together(context, assigned, units)
    assert caught.value.exit_code == 143
    monkeypatch.undo()
    for unit in units:
        assert finished_result(unit.folder(context)) is None
        assert (unit.folder(context) / "checkpoints").is_dir()

    train_together(context, assigned, units)
    for i in range(2):
        ours = load_checkpoint(context.folder.expert(i) / "best").model
        theirs = load_checkpoint(finished_run / "experts" / f"{i:02d}" / "best").model
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_error_of_one_stops_the_others_and_is_the_one_raised(
    open_new: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = open_new("failing", AT_ONCE, "train.steps=4000")
    assigned = assign(context)
    monkeypatch.setattr("pyper.stages.train._branch_from_seed", lambda *args: None)
    usual = together.train_unit

    def poisoned(context: Context, assigned: object, unit: Unit, *rest: object) -> object:
        if unit.index == 1:
            raise NonFiniteError("the loss is nan", hint="lower the rate")
        return usual(context, assigned, unit, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(together, "train_unit", poisoned)
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        train_together(context, assigned, [Unit("expert", 0), Unit("expert", 1)])
    assert finished_result(context.folder.expert(0)) is None


@pytest.mark.parametrize("setting", ["model.kind=sparse", "train.precision=fp8"])
def test_what_cannot_be_trained_together_is_refused_where_it_is_asked_for(
    setting: str, open_new: Open
) -> None:
    with pytest.raises(ConfigError, match="parallel_experts"):
        open_new("asked", AT_ONCE, setting)


def test_routed_experts_are_not_trained_together(open_new: Open) -> None:
    assert not pays_together(open_new("routed", "model.kind=sparse"), 2)


@pytest.mark.parametrize(
    ("d_model", "rows", "small"), [(256, 16, True), (256, 256, False), (512, 16, False)]
)
def test_experts_are_small_by_what_a_step_has_to_do(d_model: int, rows: int, small: bool) -> None:
    model = ExpertConfig(d_model=d_model, n_layers=4, n_heads=4, vocab_size=8192)
    train = TrainConfig(steps=1, global_batch_tokens=2**18, micro_batch_size=rows)
    run = RunConfig(model=model, data=DataConfig(seq_len=1024), train=train)
    assert is_small(run) == small


def test_on_a_cpu_experts_are_not_trained_together_unless_asked_to(open_new: Open) -> None:
    assert not pays_together(open_new("usual"), 8)
    assert pays_together(open_new("asked", AT_ONCE), 8)
