"""Experts whose steps are taken at once learn what each of them would learn alone."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import SEQ_LEN, new_config, new_model, new_plan, trace_of, weights_of
from torch import Tensor

from pyper.checkpoint import load_checkpoint
from pyper.config import TrainConfig
from pyper.config.train import EarlyStoppingConfig
from pyper.data import Batch
from pyper.errors import InterruptedRun, NonFiniteError, PyperError
from pyper.nn import Transformer
from pyper.train import Schedule, TrainingData, TrainResult, next_token_loss, train_expert
from pyper.train.muon import Muon
from pyper.train.optimizer import ExpertOptimizer
from pyper.train.stacked_step import StackedStep
from pyper.train.stacked_steps import StackedSteps
from pyper.train.step import StepResult, train_step

pytestmark = pytest.mark.usefixtures("one_thread")

SECONDS = 60
"""A test that takes longer hangs."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STOP_EARLY = EarlyStoppingConfig(patience=1, min_delta=5.0)
Loop = Callable[[StackedSteps, int], Any]


class Expert:
    """One expert's part of a test: what it trains with."""

    def __init__(self, steps: int = 8, seed: int = 5, **config: Any) -> None:
        rate = config.pop("rate", 3e-3)
        self.config = new_config(**{"steps": steps} | config)
        self.plan = new_plan(
            steps,
            random_seed=seed,
            learning_rate=rate,
            schedule=Schedule("wsd", steps, 2, 0.5, 0.0),
        )


DIFFERENT = [
    Expert(),
    Expert(rate=1e-2, seed=6),
    Expert(gradient_clip=1e-2, seed=7),
    Expert(steps=5, seed=8),
    Expert(steps=11, early_stopping=STOP_EARLY, eval_every=2, seed=9),
    Expert(weight_decay=0.0, micro_batch_size=2),
]


def at_once(loops: Sequence[Loop]) -> list[Any]:
    """What the loops return; fails instead of waiting for ever."""
    steps = StackedSteps(len(loops))

    def run() -> list[Any]:
        with ThreadPoolExecutor(len(loops)) as pool:
            futures = [pool.submit(loop, steps, i) for i, loop in enumerate(loops)]
            steps.run()
        return [future.exception() or future.result() for future in futures]

    done: Future[list[Any]] = Future()
    threading.Thread(target=lambda: done.set_result(run()), daemon=True).start()
    return done.result(timeout=SECONDS)


def loop_of(
    expert: Expert, data: TrainingData, folder: Path, dtype: torch.dtype, **others: Any
) -> Loop:
    def loop(steps: StackedSteps, number: int) -> tuple[TrainResult, dict[str, Tensor]]:
        with steps.loop(number) as new_step:
            model = new_model(dtype)
            result = train_expert(
                model, data, expert.config, expert.plan, folder, new_step=new_step, **others
            )
            return result, weights_of(model)

    return loop


def alone(
    expert: Expert, data: TrainingData, folder: Path, dtype: torch.dtype
) -> tuple[TrainResult, dict[str, Tensor]]:
    model = new_model(dtype)
    return train_expert(model, data, expert.config, expert.plan, folder), weights_of(model)


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


def parts_of(step: int, expert: int, n_parts: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(100 * step + expert)
    tokens = torch.randint(257, (4, SEQ_LEN + 1), generator=generator)
    return Batch(tokens[:, :-1], tokens[:, 1:]).split(4 // n_parts)


def crew(config: TrainConfig, dtype: torch.dtype, device: str) -> list[Transformer]:
    models = [new_model(dtype).to(device) for _ in range(3)]
    for number, model in enumerate(models):
        with torch.no_grad():
            model.head.weight.mul_(1 + number)
    return models


def test_a_poisoned_expert_is_not_updated_and_the_others_are() -> None:
    config = new_config(optimizer="muon")
    models = crew(config, torch.float32, "cpu")
    optimizers = [ExpertOptimizer(model, config, 3e-3) for model in models]
    with torch.no_grad():
        models[1].head.weight[0, 0] = torch.nan
    before = [weights_of(model) for model in models]
    results = StackedStep(models, optimizers)([parts_of(0, e, 1) for e in range(3)], [1.0] * 3)
    assert isinstance(results[1], NonFiniteError)
    for number, model in enumerate(models):
        same = [
            torch.equal(w.nan_to_num(), before[number][n].nan_to_num())
            for n, w in model.state_dict().items()
        ]
        assert all(same) if number == 1 else not any(same)
        assert all(p.grad is None for p in model.parameters())


def optimizers_of(
    models: Sequence[Transformer], optimizer: str, products: torch.dtype
) -> list[ExpertOptimizer]:
    """products: what Muon multiplies in, on a GPU bfloat16 unless told otherwise."""
    made = [ExpertOptimizer(m, new_config(optimizer=optimizer), 3e-3) for m in models]
    for muon in (o for own in made for o in own._optimizers if isinstance(o, Muon)):
        muon.dtype = products
    return made


def rates_of(step: int) -> list[float]:
    return [(1 + number) / (3 + 3 * step) for number in range(3)]


def taken_at_once(
    optimizer: str, products: torch.dtype, n_parts: int
) -> tuple[list[Transformer], list[list[StepResult | PyperError]]]:
    """Seven steps of three experts in float32, the second one poisoned before the last."""
    models = crew(new_config(), torch.float32, DEVICE)
    step_fn = StackedStep(models, optimizers_of(models, optimizer, products))
    results = []
    for step in range(7):
        if step == 6:
            with torch.no_grad():
                models[1].head.weight[0, 0] = torch.nan
        results.append(step_fn([parts_of(step, e, n_parts) for e in range(3)], rates_of(step)))
        is_recorded = step_fn._recording is not None
        assert is_recorded == (DEVICE == "cuda" and step in (3, 4, 5))
    return models, results


def taken_one_by_one(
    optimizer: str, products: torch.dtype, n_parts: int, dtype: torch.dtype = torch.float32
) -> tuple[list[Transformer], list[list[StepResult]]]:
    """The same steps, usual ones, none poisoned."""
    models = crew(new_config(), dtype, DEVICE)
    triples = list(zip(models, optimizers_of(models, optimizer, products), range(3), strict=True))
    results = [
        [
            train_step(m, parts_of(step, e, n_parts), o, rates_of(step)[e], next_token_loss)
            for m, o, e in triples
        ]
        for step in range(7)
    ]
    return models, results


@pytest.mark.parametrize("n_parts", [1, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_of_all_recorded_on_a_gpu_are_usual_steps_of_each(
    optimizer: str, n_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyper.train.stacked_step.LONG_STEP", float("inf"))
    ours, results = taken_at_once(optimizer, torch.float32, n_parts)
    theirs, expected = taken_one_by_one(optimizer, torch.float32, n_parts)
    assert isinstance(results[6][1], NonFiniteError)
    for step, number in product(range(7), range(3)):
        if (step, number) == (6, 1):
            continue
        result = results[step][number]
        assert isinstance(result, StepResult)
        assert result.loss == pytest.approx(expected[step][number].loss, rel=1e-4)
        norm = expected[step][number].gradient_norm
        assert result.gradient_norm == pytest.approx(norm, rel=1e-3)
    for number in (0, 2):
        torch.testing.assert_close(
            weights_of(ours[number]), weights_of(theirs[number]), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("n_parts", [1, 2])
def test_with_products_of_muon_in_bf16_weights_are_as_near_to_exact_ones(
    n_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the last bit of a float32 gradient may change how a direction is rounded to bf16."""
    monkeypatch.setattr("pyper.train.stacked_step.LONG_STEP", float("inf"))
    ours, _ = taken_at_once("muon", torch.bfloat16, n_parts)
    theirs, _ = taken_one_by_one("muon", torch.bfloat16, n_parts)
    exact, _ = taken_one_by_one("muon", torch.float64, n_parts, torch.float64)
    for number in (0, 2):
        error = distance(theirs[number], exact[number])
        assert 0 < error < 0.1
        assert distance(ours[number], exact[number]) < 1.5 * error


def distance(model: Transformer, other: Transformer) -> float:
    """Between all weights of two models."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    squares = [float((a.detach().double() - b.detach().double()).square().sum()) for a, b in pairs]
    return float(sum(squares) ** 0.5)


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
