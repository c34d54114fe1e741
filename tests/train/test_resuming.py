"""A run that is stopped and goes on ends exactly as one that never stopped."""

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_training import Train, new_config, new_plan, trace_of
from torch import Tensor

from pyper.config import TrainConfig
from pyper.data import Batch
from pyper.errors import DataError, InterruptedRun, LockedError
from pyper.train import TrainingData
from pyper.train.metrics import MetricsFile, read_metrics

STEPS = 8


def stop_at_every_step(
    train: Train, folder: Path, config: TrainConfig, data: TrainingData
) -> dict[str, Tensor]:
    """Every process makes one step."""
    for step in range(1, STEPS):
        with pytest.raises(InterruptedRun, match=f"stopped at step {step} of {STEPS}, state saved"):
            train(folder, config, data=data, should_stop=lambda step: True)
    return train(folder, config, data=data)[1]


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stopping_after_every_step_changes_no_bit(
    train: Train, short_data: TrainingData, tmp_path: Path, optimizer: str, workers: int
) -> None:
    """With accumulated gradients and over the edges of epochs."""
    config = new_config(optimizer=optimizer, micro_batch_size=3)
    data = dataclasses.replace(short_data, loader_workers=workers)
    _, whole = train(tmp_path / "whole", config, data=data)

    resumed = stop_at_every_step(train, tmp_path / "stopped", config, data)

    assert_same(resumed, whole)
    trace = trace_of(tmp_path / "whole")
    assert trace_of(tmp_path / "stopped") == trace
    assert trace[-1]["step"] == STEPS
    assert max(record.get("epoch", 0) for record in trace) >= 1


@pytest.mark.parametrize("step", range(1, STEPS))
def test_stopping_once_at_any_step_changes_no_bit(
    train: Train, short_data: TrainingData, tmp_path: Path, step: int
) -> None:
    _, whole = train(tmp_path / "whole", data=short_data)
    with pytest.raises(InterruptedRun):
        train(tmp_path / "cut", data=short_data, should_stop=lambda now: now == step)

    _, resumed = train(tmp_path / "cut", data=short_data)

    assert_same(resumed, whole)
    assert trace_of(tmp_path / "cut") == trace_of(tmp_path / "whole")


def test_bf16_weights_and_their_masters_resume_exactly(train: Train, tmp_path: Path) -> None:
    config = new_config(precision="bf16", optimizer="muon")
    _, whole = train(tmp_path / "whole", config, dtype=torch.bfloat16)
    with pytest.raises(InterruptedRun):
        train(tmp_path / "cut", config, dtype=torch.bfloat16, should_stop=lambda step: step == 4)

    _, resumed = train(tmp_path / "cut", config, dtype=torch.bfloat16)

    assert next(iter(resumed.values())).dtype == torch.bfloat16
    assert_same(resumed, whole)


def test_a_killed_run_goes_on_from_its_last_checkpoint_without_repeating_lines(
    train: Train, tmp_path: Path
) -> None:
    """No chance to save: the steps since the checkpoint are made again, and logged once."""
    config = new_config(eval_every=3)
    _, whole = train(tmp_path / "whole", config)

    def die(step: int) -> bool:
        if step == 5:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", config, should_stop=die)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 5, "lo')  # a write cut short

    _, resumed = train(tmp_path / "killed", config)

    assert_same(resumed, whole)
    assert trace_of(tmp_path / "killed") == trace_of(tmp_path / "whole")


def test_early_stopping_counts_on_after_a_stop(train: Train, tmp_path: Path) -> None:
    config = new_config(eval_every=1, early_stopping={"patience": 3, "min_delta": 100.0})
    result, _ = train(tmp_path / "whole", config)
    with pytest.raises(InterruptedRun):
        train(tmp_path / "cut", config, should_stop=lambda step: step == 2)

    resumed, _ = train(tmp_path / "cut", config)

    assert (resumed.steps, resumed.best_step) == (result.steps, result.best_step) == (4, 1)


def test_training_again_after_the_end_makes_no_step(train: Train, tmp_path: Path) -> None:
    first, weights = train(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()

    again, same = train(tmp_path)

    assert again == first
    assert_same(same, weights)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_resuming_on_other_data_is_refused(
    train: Train, short_data: TrainingData, tmp_path: Path
) -> None:
    with pytest.raises(InterruptedRun):
        train(tmp_path, should_stop=lambda step: True)

    with pytest.raises(DataError, match="cannot resume"):
        train(tmp_path, data=short_data)


def test_a_second_writer_is_refused(train: Train, tmp_path: Path) -> None:
    def begin_again(step: int) -> bool:
        with pytest.raises(LockedError, match="in use by process"):
            train(tmp_path)
        return False

    result, _ = train(tmp_path, new_config(steps=1), new_plan(2), should_stop=begin_again)

    assert result.steps == 2


def test_random_numbers_of_a_batch_transform_go_on_where_they_stopped(
    train: Train, tmp_path: Path
) -> None:
    def drop_tokens(batch: Batch) -> Batch:
        return Batch(batch.tokens, batch.targets, torch.rand(batch.targets.shape).round())

    _, whole = train(tmp_path / "whole", batch_transform=drop_tokens)
    with pytest.raises(InterruptedRun):
        train(tmp_path / "cut", batch_transform=drop_tokens, should_stop=lambda step: step == 4)

    _, resumed = train(tmp_path / "cut", batch_transform=drop_tokens)

    assert_same(resumed, whole)


@pytest.mark.parametrize("patience", [None, 5])
def test_a_kill_before_the_best_checkpoint_was_marked_is_made_good(
    train: Train, tmp_path: Path, patience: int | None
) -> None:
    stopping = None if patience is None else {"patience": patience}
    config = new_config(early_stopping=stopping, eval_every=STEPS)
    _, whole = train(tmp_path, config)
    (tmp_path / "best").unlink()

    result, again = train(tmp_path, config)

    assert_same(again, whole)
    assert result.best_step == STEPS
    assert (tmp_path / "best").is_symlink()


def test_the_log_outlives_a_kill_right_after_a_resume(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    log = MetricsFile(file, resume_step=0)
    for step in range(1, 7):
        log.write({"step": step})
    log.close()

    resumed = MetricsFile(file, resume_step=4)
    found = [record["step"] for record in read_metrics(file)]  # as a kill would leave it
    resumed.close()

    assert found == [1, 2, 3, 4]
