import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pyper.errors import ConfigError, NonFiniteError
from pyper.routing import (
    Assignment,
    apply_prices,
    assign_expert_choice,
    assign_greedy,
    assign_with_prices,
)

RULES = [assign_with_prices, assign_greedy, assign_expert_choice]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def total(scores: Tensor, assignment: Assignment) -> float:
    return float(scores.double().gather(1, assignment.expert.unsqueeze(1)).sum())


def optimum(scores: Tensor) -> float:
    """The linear assignment, every expert's column repeated as often as it has places."""
    places = np.repeat(scores.double().numpy(), len(scores) // scores.shape[1], axis=1)
    rows, columns = linear_sum_assignment(places, maximize=True)
    return float(places[rows, columns].sum())


@pytest.mark.parametrize(
    "scores",
    [
        normal(16, 4),
        normal(1024, 8),
        normal(256, 32),
        # difficulty that varies far more than the experts differ, and one expert better at all
        5 * normal(512, 8) + 200 * normal(512, 1, seed=1) - 3000 + torch.arange(8) * 10.0,
        torch.zeros(256, 8),
        normal(512, 4).round(),
        normal(32, 8).repeat(8, 1),
    ],
    ids=["tiny", "normal", "many-experts", "difficulty", "all-equal", "ties", "duplicates"],
)
def test_prices_reach_the_linear_assignment_with_equal_loads(scores: Tensor) -> None:
    found = assign_with_prices(scores)
    assert total(scores, found) == pytest.approx(optimum(scores), rel=1e-9, abs=1e-9)
    counts = torch.bincount(found.expert, minlength=scores.shape[1])
    assert counts.tolist() == [len(scores) // scores.shape[1]] * scores.shape[1]


def test_the_prices_that_come_back_give_the_assignment() -> None:
    scores = normal(5000, 8) * 20
    found = assign_with_prices(scores)
    again = apply_prices(scores, found.prices)
    assert (again == found.expert).float().mean() > 0.998  # the last sequence of each path is tied
    alone = torch.cat([apply_prices(row, found.prices) for row in scores[:50].split(1)])
    assert torch.equal(alone, again[:50])


def test_a_sample_finds_the_prices_of_many_sequences() -> None:
    scores = normal(200_000, 4) + torch.arange(4)
    scores = scores[scores[:, 0].argsort()]  # sorted data must not mislead the sample
    found = assign_with_prices(scores)
    assert torch.bincount(found.expert).tolist() == [50_000] * 4
    slack = (scores - found.prices).max(dim=1).values - (scores - found.prices).gather(
        1, found.expert.unsqueeze(1)
    ).squeeze(1)
    assert slack.max() < 1e-6  # complementary slackness: an optimum
    assert found.n_iterations < 200


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 60), n_experts=st.integers(1, 9), seed=st.integers(0, 99))
def test_loads_differ_by_at_most_one_sequence(n: int, n_experts: int, seed: int) -> None:
    scores = normal(n, n_experts, seed=seed)
    for rule in RULES:
        found = rule(scores)
        counts = torch.bincount(found.expert, minlength=n_experts)
        assert counts.max() - counts.min() <= 1
        assert counts.sum() == n
        assert found.load.sum() == pytest.approx(1.0 if n else 0.0)


def test_a_constant_or_a_scale_changes_no_assignment() -> None:
    scores = normal(1000, 8, seed=3).double()
    expert = assign_with_prices(scores).expert
    assert torch.equal(assign_with_prices(scores * 1000).expert, expert)
    moved = scores + 100 * normal(1000, 1, seed=4).double()
    assert torch.equal(assign_with_prices(moved).expert, expert)


@pytest.mark.parametrize("rule", RULES)
def test_capacities_set_the_loads(rule) -> None:
    shares = torch.tensor([4.0, 2.0, 1.0, 1.0])
    found = rule(normal(800, 4), capacity=shares)
    assert torch.bincount(found.expert).tolist() == [400, 200, 100, 100]


def test_token_counts_balance_tokens_and_price_each_token() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(10, 1000, (20_000,), generator=generator).float()
    scores = normal(20_000, 8) * tokens.unsqueeze(1) ** 0.5 * 3
    scores += 0.2 * tokens.unsqueeze(1) * torch.arange(8)
    found = assign_with_prices(scores, weights=tokens)
    assert (found.load * 8 - 1).abs().max() < 1e-3
    again = apply_prices(scores, found.prices, tokens)
    assert (again == found.expert).float().mean() > 0.99


def test_few_heavy_sequences_are_balanced_as_far_as_lumps_go() -> None:
    tokens = torch.tensor([5.0, 1, 1, 1, 1, 1, 4, 2])
    found = assign_with_prices(torch.zeros(8, 2), weights=tokens)
    assert (found.load * 16 - 8).abs().max() <= 1


def test_a_warm_start_takes_fewer_steps() -> None:
    scores = normal(20_000, 8) * 20 + torch.arange(8) * 15.0
    cold = assign_with_prices(scores)
    warm = assign_with_prices(scores, prices=cold.prices)
    assert warm.n_iterations < cold.n_iterations
    assert total(scores, warm) == pytest.approx(total(scores, cold))


def test_greedy_fills_the_easiest_first() -> None:
    scores = torch.tensor([[-1.0, -2.0], [-1.5, -9.0], [-5.0, -6.0], [-3.0, -3.5]])
    assert assign_greedy(scores).expert.tolist() == [0, 0, 1, 1]


def test_greedy_is_worse_than_prices_where_difficulty_varies() -> None:
    scores = normal(2000, 8).double()
    scores[:, 0] += 5 * torch.rand(2000, generator=torch.Generator().manual_seed(1))
    lost = []
    for difficulty in (0.0, 200.0):
        hard = scores + difficulty * normal(2000, 1, seed=2)
        lost.append(total(hard, assign_with_prices(hard)) - total(hard, assign_greedy(hard)))
    assert lost[1] > lost[0] > 0
    assert lost[1] > 0.2 * 2000  # nats per sequence


def test_expert_choice_matches_the_obvious_loop() -> None:
    scores = normal(12, 3)
    probs = scores.double().softmax(dim=1)
    picks = {e: set(probs[:, e].argsort(descending=True)[:4].tolist()) for e in range(3)}
    found = assign_expert_choice(scores)
    for n in range(12):
        takers = [e for e in range(3) if n in picks[e]]
        if takers:
            assert found.expert[n] == max(takers, key=lambda e: float(probs[n, e]))
    missed = [n for n in range(12) if not any(n in picks[e] for e in range(3))]
    assert found.unassigned == len(missed) / 12


def test_expert_choice_ignores_difficulty() -> None:
    scores = normal(400, 8)
    harder = scores + 200 * normal(400, 1, seed=1)
    assert abs(assign_expert_choice(scores).unassigned - 0.1) < 0.15
    same = assign_expert_choice(scores).expert == assign_expert_choice(harder).expert
    assert same.float().mean() > 0.99


@pytest.mark.parametrize("rule", RULES)
def test_nan_and_infinite_scores_are_refused(rule) -> None:
    for bad in (float("nan"), float("-inf")):
        scores = normal(10, 2)
        scores[3, 1] = bad
        with pytest.raises(NonFiniteError, match="NaN or infinite"):
            rule(scores)


@pytest.mark.parametrize("rule", RULES)
def test_arguments_that_do_not_fit_are_named(rule) -> None:
    with pytest.raises(ConfigError, match="capacity"):
        rule(normal(10, 2), capacity=torch.tensor([1.0, 0.0]))
    with pytest.raises(ConfigError, match="weights"):
        rule(normal(10, 2), weights=torch.zeros(10))
    with pytest.raises(ConfigError, match=r"\(N, E\)"):
        rule(normal(10))


@pytest.mark.parametrize("rule", RULES)
def test_scores_are_left_as_they_were_and_the_result_repeats(rule) -> None:
    scores = normal(300, 5)
    before = scores.clone()
    assert torch.equal(rule(scores).expert, rule(scores).expert)
    assert torch.equal(scores, before)
