"""Experts that train at once learn what each of them would learn alone; nobody waits for ever."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from stacked_loops import SECONDS, Expert, Loop, alone, at_once, loop_of
from tiny_training import new_model, trace_of
from torch import Tensor

from pyper.checkpoint import load_checkpoint
from pyper.config.train import EarlyStoppingConfig
from pyper.data import Batch
from pyper.errors import InterruptedRun, NonFiniteError
from pyper.train import TrainingData, TrainResult, train_expert
from pyper.train.stacked_step import StackedStep
from pyper.train.stacked_steps import StackedSteps

pytestmark = pytest.mark.usefixtures("one_thread")

STOP_EARLY = EarlyStoppingConfig(patience=1, min_delta=5.0)
DIFFERENT = [
    Expert(),
    Expert(rate=1e-2, seed=6),
    Expert(gradient_clip=1e-2, seed=7),
    Expert(steps=5, seed=8),
    Expert(steps=11, early_stopping=STOP_EARLY, eval_every=2, seed=9),
    Expert(weight_decay=0.0, micro_batch_size=2),
]


def assert_close_folders(ours: Path, theirs: Path, tolerance: float) -> None:
    for one, other in zip(trace_of(ours), trace_of(theirs), strict=True):
        assert one == pytest.approx(other, rel=tolerance, abs=tolerance)
    checkpoints = [load_checkpoint(folder / "best") for folder in (ours, theirs)]
    assert checkpoints[0].step == checkpoints[1].step
    one, other = ({n: t for n, t in c.optimizer.items() if "rng" not in n} for c in checkpoints)
    for name, saved in one.items():
        if saved.dtype.is_floating_point:  # codes of 8 bits may round to a neighbour
            torch.testing.assert_close(saved, other[name], rtol=1e-3, atol=tolerance)


@pytest.mark.parametrize(
    "settings",
    [{}, {"optimizer": "muon"}, {"optimizer": "muon", "state_bits": 8}, {"optimizer": "adamw8bit"}],
    ids=str,
)
def test_losses_weights_and_checkpoints_are_those_of_separate_training(
    settings: dict[str, Any], training_data: TrainingData, tmp_path: Path
) -> None:
    for expert in DIFFERENT:
        expert.config = expert.config.model_copy(
            update={"optimizer": "adamw", "state_bits": 32} | settings
        )
    separate = [
        alone(expert, training_data, tmp_path / f"alone{i}", torch.float32)
        for i, expert in enumerate(DIFFERENT)
    ]
    loops = [
        loop_of(expert, training_data, tmp_path / f"both{i}", torch.float32)
        for i, expert in enumerate(DIFFERENT)
    ]
    for i, (result, weights) in enumerate(at_once(loops)):
        expected, expected_weights = separate[i]
        assert (result.steps, result.best_step) == (expected.steps, expected.best_step)
        assert result.loss == pytest.approx(expected.loss, rel=1e-5)
        torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-5)
        assert_close_folders(tmp_path / f"both{i}", tmp_path / f"alone{i}", 1e-5)
    assert separate[4][0].stopped_early


def test_bf16_weights_go_along_with_those_of_separate_training(
    training_data: TrainingData, tmp_path: Path
) -> None:
    experts = [Expert(seed=i, optimizer="muon", micro_batch_size=2) for i in range(3)]
    loops = [
        loop_of(expert, training_data, tmp_path / f"both{i}", torch.bfloat16)
        for i, expert in enumerate(experts)
    ]
    at_once(loops)
    for i, expert in enumerate(experts):
        alone(expert, training_data, tmp_path / f"alone{i}", torch.bfloat16)
        ours, theirs = (
            [r["loss"] for r in trace_of(tmp_path / f"{kind}{i}") if "loss" in r]
            for kind in ("both", "alone")
        )
        assert ours == pytest.approx(theirs, rel=2e-3)


def test_experts_that_are_stopped_go_on_together(
    training_data: TrainingData, tmp_path: Path
) -> None:
    experts = [Expert(optimizer="muon"), Expert(seed=6, optimizer="muon", steps=6)]
    expected = [
        alone(expert, training_data, tmp_path / f"alone{i}", torch.float32)[1]
        for i, expert in enumerate(experts)
    ]
    cuts: list[dict[str, Any]] = [{"should_stop": lambda step: step == 3}, {}]
    for others in cuts:
        results = at_once(
            [
                loop_of(expert, training_data, tmp_path / str(i), torch.float32, **others)
                for i, expert in enumerate(experts)
            ]
        )
        if others:
            assert all(isinstance(result, InterruptedRun) for result in results)
    for (_, weights), wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(weights, wanted, rtol=1e-4, atol=1e-5)


def test_the_others_go_on_when_one_fails(training_data: TrainingData, tmp_path: Path) -> None:
    def poisoned(batch: Batch) -> Batch:
        weights = torch.full(batch.tokens.shape, torch.nan)
        return Batch(batch.tokens, batch.targets, weights)

    def careless(steps: StackedSteps, number: int) -> None:
        with steps.loop(number):
            raise OSError("no space left")

    good = Expert()
    expected = alone(good, training_data, tmp_path / "alone", torch.float32)[1]
    results = at_once(
        [
            loop_of(good, training_data, tmp_path / "0", torch.float32),
            loop_of(good, training_data, tmp_path / "1", torch.float32, batch_transform=poisoned),
            careless,
            loop_of(good, training_data, tmp_path / "3", torch.float32),
        ]
    )
    assert isinstance(results[1], NonFiniteError)
    assert isinstance(results[2], OSError)
    for number in (0, 3):
        torch.testing.assert_close(results[number][1], expected, rtol=1e-4, atol=1e-5)


def test_no_loop_goes_on_before_all_steps_are_taken(
    training_data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts of two shapes: the second step would run beside what follows the first."""
    events: list[str] = []
    usual = StackedStep._compute

    def noted(self: StackedStep, batches: Sequence[Batch]) -> Tensor:
        events.append("begin")
        time.sleep(0.05)
        sums = usual(self, batches)
        events.append("end")
        return sums

    def goes_on(step: int) -> bool:
        events.append("loop")
        return False

    monkeypatch.setattr(StackedStep, "_compute", noted)
    sizes = (4, 4, 2, 2)
    loops = [
        loop_of(
            Expert(steps=3, seed=i, micro_batch_size=size),
            training_data,
            tmp_path / str(i),
            torch.float32,
            should_stop=goes_on,
        )
        for i, size in enumerate(sizes)
    ]
    at_once(loops)
    assert events == (["begin", "end"] * 2 + ["loop"] * len(sizes)) * 3


def test_whoever_still_waits_when_stepping_ends_gets_an_error(
    training_data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(StackedStep, "_compute", interrupted)
    steps = StackedSteps(2)
    with ThreadPoolExecutor(2) as pool:
        loops = [
            loop_of(Expert(), training_data, tmp_path / str(i), torch.float32) for i in range(2)
        ]
        futures = [pool.submit(loop, steps, i) for i, loop in enumerate(loops)]
        with pytest.raises(KeyboardInterrupt):
            steps.run()
        steps.close()
        errors = [future.exception(timeout=SECONDS) for future in futures]
    assert all("has ended" in str(error) for error in errors)


def test_an_error_of_a_common_step_reaches_all(
    training_data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("the device is full")

    monkeypatch.setattr(StackedStep, "_compute", full)
    loops = [loop_of(Expert(), training_data, tmp_path / str(i), torch.float32) for i in range(2)]
    assert all("out of memory at 4" in str(result) for result in at_once(loops))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_loops_on_a_gpu_do_not_wait_for_each_other_for_ever(
    training_data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyper.train.stacked_step.LONG_STEP", float("inf"))

    def on_gpu(number: int) -> Loop:
        def loop(steps: StackedSteps, i: int) -> TrainResult:
            with steps.loop(i) as new_step:
                expert = Expert(steps=8 + 4 * number, seed=number, optimizer="muon")
                model = new_model(torch.bfloat16).to("cuda")
                folder = tmp_path / str(number)
                return train_expert(
                    model, training_data, expert.config, expert.plan, folder, new_step=new_step
                )

        return loop

    results = at_once([on_gpu(number) for number in range(4)])
    assert [result.steps for result in results] == [8, 12, 16, 20]
