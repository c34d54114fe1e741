import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyper.routing import (
    choose_experts,
    load_balancing_loss,
    quantile_updated_bias,
    router_z_loss,
    sign_updated_bias,
)
from pyper.routing.token_choice import _kth_of_others, _quantile


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def skewed(n: int, e: int, seed: int = 0) -> Tensor:
    """Softmax scores (N, E) of which the first experts get most without a bias."""
    return (normal(n, e, seed=seed) - 0.6 * torch.arange(e)).softmax(dim=-1)


def load_of(scores: Tensor, bias: Tensor, top_k: int) -> Tensor:
    return choose_experts(scores + bias, top_k).sum(dim=0).float()


def violation(load: Tensor) -> float:
    return float(load.max() / load.mean() - 1)


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 20), e=st.integers(1, 9), seed=st.integers(0, 99), data=st.data())
def test_a_token_takes_its_highest_experts_as_in_the_obvious_loop(
    n: int, e: int, seed: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, e))
    scores, padding = normal(n, e, seed=seed), normal(n, seed=seed + 1) > 0
    free, padded = choose_experts(scores, top_k), choose_experts(scores, top_k, padding)
    assert free.dtype == torch.bool
    for i in range(n):
        row = scores[i].tolist()
        best = sorted(range(e), key=lambda j: -row[j])[:top_k]
        assert free[i].nonzero().squeeze(1).tolist() == sorted(best)
        assert padded[i].sum() == (0 if padding[i] else top_k)
    assert torch.equal(padded[~padding], free[~padding])


def test_ties_still_give_each_token_its_number_of_experts() -> None:
    assert choose_experts(torch.zeros(7, 5), 3).sum(dim=1).tolist() == [3] * 7


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 20), e=st.integers(1, 9), seed=st.integers(0, 99))
def test_the_balancing_loss_matches_the_obvious_loop(n: int, e: int, seed: int) -> None:
    probs = normal(n, e, seed=seed, dtype=torch.float64).softmax(dim=-1)
    share = normal(e, seed=seed + 1, dtype=torch.float64).softmax(dim=-1)
    expected = e * sum(
        float(share[j]) * sum(float(probs[i, j]) for i in range(n)) / n for j in range(e)
    )
    assert float(load_balancing_loss(probs, share)) == pytest.approx(expected)


@pytest.mark.parametrize("e", [2, 8])
def test_the_balancing_loss_is_one_at_uniform_and_more_where_choices_follow_probabilities(
    e: int,
) -> None:
    uniform = torch.full((12, e), 1 / e)
    assert load_balancing_loss(uniform, torch.full((e,), 1 / e)) == pytest.approx(1.0)
    one = torch.nn.functional.one_hot(torch.zeros(12, dtype=torch.long), e).float()
    assert load_balancing_loss(one, one[0]) == pytest.approx(e)
    probs = skewed(500, e)
    load = load_of(probs, torch.zeros(e), 1)
    assert load_balancing_loss(probs, load / load.sum()) > 1.05


def test_the_balancing_loss_pushes_probability_off_the_busy_experts() -> None:
    logits = normal(6, 4, dtype=torch.float64).requires_grad_()
    share = torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: load_balancing_loss(x.softmax(dim=-1), share), (logits,)
    )
    load_balancing_loss(logits.softmax(dim=-1), share).backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1:] < 0).all()


def test_the_z_loss_is_the_mean_squared_log_partition() -> None:
    logits = normal(9, 5, dtype=torch.float64)
    expected = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits.tolist()) / 9
    assert float(router_z_loss(logits)) == pytest.approx(expected)
    assert float(router_z_loss(logits.log_softmax(dim=-1))) == pytest.approx(0.0, abs=1e-12)
    assert router_z_loss(torch.full((2, 4), 1e4)).isfinite()
    assert torch.autograd.gradcheck(router_z_loss, (logits.requires_grad_(),))


def test_the_sign_update_raises_the_idle_and_lowers_the_busy() -> None:
    bias = torch.tensor([0.5, 0.0, -0.5])
    got = sign_updated_bias(bias, torch.tensor([30, 20, 10]), 0.1)
    torch.testing.assert_close(got, torch.tensor([0.4, 0.0, -0.4]))
    assert bias.tolist() == [0.5, 0.0, -0.5]


@pytest.mark.parametrize(("e", "top_k"), [(2, 1), (8, 1), (8, 2), (5, 4)])
def test_sign_updates_balance_skewed_loads(e: int, top_k: int) -> None:
    bias = torch.zeros(e)
    before = violation(load_of(skewed(2000, e), bias, top_k))
    for step in range(1500):
        bias = sign_updated_bias(bias, load_of(skewed(2000, e, seed=step), bias, top_k), 5e-4)
    after = violation(load_of(skewed(20_000, e, seed=5000), bias, top_k))
    assert after < 0.1
    assert after < before / 2


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 10), e=st.integers(2, 9), seed=st.integers(0, 99), data=st.data())
def test_the_kth_of_the_others_matches_the_obvious_loop(
    n: int, e: int, seed: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, e - 1))
    biased = normal(n, e, seed=seed).round(decimals=data.draw(st.integers(0, 3)))  # 0: ties
    got = _kth_of_others(biased, k)
    for i in range(n):
        for j in range(e):
            others = [float(v) for m, v in enumerate(biased[i]) if m != j]
            assert float(got[i, j]) == sorted(others, reverse=True)[k - 1]


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 30), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_quantiles_are_those_of_torch(n: int, share: float, seed: int) -> None:
    values = normal(n, 3, seed=seed, dtype=torch.float64)
    torch.testing.assert_close(_quantile(values, share), torch.quantile(values, share, dim=0))


def test_many_scores_are_no_obstacle() -> None:
    scores = torch.zeros(2_100_000, 8)  # torch.quantile takes 16 M elements at most
    assert quantile_updated_bias(torch.zeros(8), scores, 1, 0.5).tolist() == [0.0] * 8


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("e", [2, 3, 4, 8])
def test_a_few_quantile_updates_balance_skewed_loads(e: int, top_k: int) -> None:
    scores, bias = skewed(4096, e), torch.zeros(e)
    for _ in range(20):
        bias = quantile_updated_bias(bias, scores, top_k, 0.5)
        assert float(bias.mean()) == pytest.approx(0.0, abs=1e-6)
    load = load_of(scores, bias, top_k)
    assert load.sum() == 4096 * min(top_k, e)
    assert violation(load) < 0.02


def test_the_exact_bias_takes_one_update_of_two_experts() -> None:
    scores = skewed(1000, 2)
    assert load_of(scores, quantile_updated_bias(torch.zeros(2), scores, 1, 0.5), 1)[0] == 500
    bias = torch.zeros(2)
    for _ in range(6):  # at the full rate they pass each other for ever
        bias = quantile_updated_bias(bias, scores, 1, 1.0)
    assert bias.abs().max() < 1e-6
    assert violation(load_of(scores, bias, 1)) > 0.2


def test_a_small_rate_goes_a_part_of_the_way() -> None:
    scores, start = skewed(512, 4), torch.zeros(4)
    whole = quantile_updated_bias(start, scores, 1, 1.0)
    torch.testing.assert_close(quantile_updated_bias(start, scores, 1, 0.25), 0.25 * whole)


def test_where_tokens_take_every_expert_there_is_nothing_to_balance() -> None:
    bias = torch.tensor([0.3, -0.1, -0.2])
    assert torch.equal(quantile_updated_bias(bias, skewed(10, 3), 3, 0.5), bias)
