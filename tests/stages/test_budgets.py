"""How the steps of a run are divided."""

from typing import Any

import pytest

from pyper.config import RunConfig, parse_run
from pyper.errors import DataError
from pyper.stages.context import Budget, plan_budget

NAMES = ["law", "poems", "maths", "code"]


def run_of(train: dict[str, Any], expert: list[dict[str, Any]] | None = None) -> RunConfig:
    return parse_run(
        {
            "data": {"seq_len": 10},
            "mixture": {"n_experts": 4},
            "train": {"global_batch_tokens": 100, **train},
            "expert": expert or [],
        }
    )


def test_seed_takes_its_share_and_experts_the_rest_equally() -> None:
    budget = plan_budget(run_of({"steps": 80}), [5000, 100, 100, 100], NAMES)
    assert budget == Budget(seed=40, experts=(10, 10, 10, 10), control=40)
    assert budget.total == 80


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.9])
def test_the_control_makes_as_many_steps_as_all_experts_together(fraction: float) -> None:
    budget = plan_budget(run_of({"steps": 200, "seed_fraction": fraction}), [100] * 4, NAMES)
    assert budget.seed == round(200 * fraction)
    assert budget.control == sum(budget.experts)
    assert budget.control == pytest.approx(200 - budget.seed, abs=2)  # experts round


def test_tokens_are_counted_in_steps() -> None:
    assert plan_budget(run_of({"tokens": "8k"}), [100] * 4, NAMES).total == 80


def test_epochs_follow_the_data_of_each_expert() -> None:
    budget = plan_budget(run_of({"epochs": 2}), [1000, 2000, 3000, 4000], NAMES)
    assert budget == Budget(seed=100, experts=(10, 20, 30, 40), control=100)


def test_an_expert_with_its_own_budget_takes_it_and_the_control_follows() -> None:
    experts = [{"name": "poems", "steps": 3}, {"index": 2, "epochs": 2}]
    budget = plan_budget(run_of({"steps": 80}, experts), [1000, 1000, 700, 1000], NAMES)
    assert budget.experts == (10, 3, 14, 10)
    assert budget.control == 37


def test_every_expert_makes_at_least_one_step() -> None:
    assert plan_budget(run_of({"steps": 3}), [100] * 4, NAMES).experts == (1, 1, 1, 1)


def test_a_budget_too_small_to_divide_is_refused() -> None:
    with pytest.raises(DataError, match="too few to divide") as caught:
        plan_budget(run_of({"steps": 1, "seed_fraction": 0.1}), [100] * 4, NAMES)
    assert "train.epochs" in caught.value.hint
