"""Steps replayed as CUDA graphs do what usual steps do."""

import pytest
import torch
from tiny_sparse import sparse_model
from tiny_training import SEQ_LEN, new_config, new_model
from torch import Tensor

from pyper.config import TrainConfig
from pyper.data import Batch
from pyper.errors import NonFiniteError
from pyper.nn import Transformer
from pyper.train import next_token_loss
from pyper.train.optimizer import ExpertOptimizer
from pyper.train.recorded_step import RecordedStep
from pyper.train.step import StepResult, train_step

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def slow_steps_are_recorded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or what is tested would depend on how busy the machine is."""
    monkeypatch.setattr("pyper.train.recorded_step.LONG_STEP", float("inf"))


def parts_of_step(step: int, n_parts: int = 2) -> list[Batch]:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(257, (6, SEQ_LEN + 1), generator=generator)
    return Batch(tokens[:, :-1], tokens[:, 1:]).split(6 // n_parts)


def factor_of_step(step: int) -> float:
    return 1.0 / (1 + step)


def train(
    model: Transformer, config: TrainConfig, recorded: bool, steps: int = 8
) -> tuple[list[StepResult], dict[str, Tensor]]:
    model = model.to("cuda")
    optimizer = ExpertOptimizer(model, config, 3e-3)
    step_fn = RecordedStep(model, optimizer, next_token_loss)
    results = []
    for step in range(steps):
        model.begin_step(step / steps)
        parts, factor = parts_of_step(step), factor_of_step(step)
        if recorded:
            results.append(step_fn(parts, factor))
        else:
            results.append(train_step(model, parts, optimizer, factor, next_token_loss))
    assert (step_fn._recording is not None) == recorded
    return results, {name: value.clone() for name, value in model.state_dict().items()}


@needs_cuda
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_steps_equal_usual_ones_to_the_bit(optimizer: str, dtype: torch.dtype) -> None:
    config = new_config(optimizer=optimizer)
    usual, weights = train(new_model(dtype), config, recorded=False)
    replayed, others = train(new_model(dtype), config, recorded=True)

    assert [(r.loss, r.gradient_norm) for r in replayed] == [
        (r.loss, r.gradient_norm) for r in usual
    ]
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]), name


@needs_cuda
@pytest.mark.parametrize(
    "mode", ["expert_choice", "threshold", "capped", "loss", "sign_bias", "token_mixture"]
)
def test_recorded_steps_route_and_learn_as_usual_ones(mode: str) -> None:
    """Sums over experts are made in any order on a GPU: equal but for rounding."""
    usual, weights = train(
        sparse_model(mode).to(dtype=torch.bfloat16), new_config(), recorded=False
    )
    replayed, others = train(
        sparse_model(mode).to(dtype=torch.bfloat16), new_config(), recorded=True
    )

    for one, other in zip(usual, replayed, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=2e-3)
    for name in (n for n in weights if n.endswith(("threshold_total", "balance_bias"))):
        torch.testing.assert_close(weights[name], others[name], rtol=0.05, atol=5e-3)
    updates = [v for n, v in others.items() if n.endswith("threshold_updates")]
    assert all(int(n) == (0 if mode in ("loss", "sign_bias") else 8) for n in updates)


@needs_cuda
def test_a_poisoned_gradient_in_a_recorded_step_updates_nothing() -> None:
    model = new_model().to("cuda")
    optimizer = ExpertOptimizer(model, new_config(), 3e-3)
    step_fn = RecordedStep(model, optimizer, next_token_loss)
    for step in range(5):
        step_fn(parts_of_step(step), 1.0)
    assert step_fn._recording is not None
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    before = {name: value.clone() for name, value in model.state_dict().items()}

    with pytest.raises(NonFiniteError):
        step_fn(parts_of_step(5), 1.0)
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name


@needs_cuda
def test_thresholds_in_training_are_recorded_anew() -> None:
    model = sparse_model("threshold").to("cuda", torch.bfloat16)
    step_fn = RecordedStep(model, ExpertOptimizer(model, new_config(), 3e-3), next_token_loss)
    recorded = []
    for step in range(10):
        model.begin_step(step / 10)  # thresholds from step 4 on
        step_fn(parts_of_step(step), 1.0)
        recorded.append(step_fn._recording is not None)
    assert recorded == [False] * 3 + [True] + [False] * 3 + [True] * 3


@needs_cuda
def test_thresholds_without_room_go_back_to_usual_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyper.nn.router_state._ROOM", 1)
    model = sparse_model("threshold").to("cuda", torch.bfloat16)
    step_fn = RecordedStep(model, ExpertOptimizer(model, new_config(), 3e-3), next_token_loss)
    for step in range(8):
        model.begin_step(step / 8)
        step_fn(parts_of_step(step), 1.0)
        assert (step_fn._recording is not None) == (step == 3)


def test_without_a_gpu_steps_are_usual_ones() -> None:
    model = new_model()
    optimizer = ExpertOptimizer(model, new_config(), 3e-3)
    step_fn = RecordedStep(model, optimizer, next_token_loss)
    other = new_model()
    other_optimizer = ExpertOptimizer(other, new_config(), 3e-3)
    for step in range(5):
        one = step_fn(parts_of_step(step), 1.0)
        two = train_step(other, parts_of_step(step), other_optimizer, 1.0, next_token_loss)
        assert (one.loss, one.gradient_norm) == (two.loss, two.gradient_norm)
