"""One step of several experts is the step of each of them."""

from collections.abc import Sequence
from itertools import product

import pytest
import torch
from tiny_training import SEQ_LEN, new_config, new_model, weights_of

from pyper.config import TrainConfig
from pyper.data import Batch
from pyper.errors import NonFiniteError, PyperError
from pyper.nn import Transformer
from pyper.train import next_token_loss
from pyper.train.muon import Muon
from pyper.train.optimizer import ExpertOptimizer
from pyper.train.stacked_step import StackedStep
from pyper.train.step import StepResult, train_step

pytestmark = pytest.mark.usefixtures("one_thread")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
