import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyper.routing import ThresholdAverage, above_threshold, as_mask, choose_tokens


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def empty(n_experts: int) -> ThresholdAverage:
    return ThresholdAverage(torch.zeros(n_experts), torch.zeros((), dtype=torch.int64))


def average_of(kth_scores: Tensor, decay: float) -> ThresholdAverage:
    average = empty(kth_scores.shape[1])
    for kth_score in kth_scores:
        average = average.updated(kth_score, decay)
    return average


@settings(max_examples=40, deadline=None)
@given(
    steps=st.integers(1, 60),
    e=st.integers(1, 6),
    decay=st.sampled_from([0.0, 0.5, 0.9, 0.99, 0.999]),
    seed=st.integers(0, 99),
)
def test_the_value_is_the_weighted_mean_of_all_that_was_seen(
    steps: int, e: int, decay: float, seed: int
) -> None:
    seen = normal(steps, e, seed=seed)
    average = average_of(seen, decay)
    weights = [(1 - decay) * decay ** (steps - 1 - i) for i in range(steps)]
    expected = sum(w * row.double() for w, row in zip(weights, seen, strict=True)) / sum(weights)
    assert average.updates == steps
    assert average.value(decay).dtype == torch.float32
    torch.testing.assert_close(average.value(decay).double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("decay", [0.5, 0.99, 0.9999, 0.999999])
def test_the_correction_keeps_its_digits_after_the_first_updates(decay: float) -> None:
    for steps in (1, 2, 5):
        value = average_of(torch.full((steps, 2), 0.75), decay).value(decay)
        torch.testing.assert_close(value, torch.full((2,), 0.75), rtol=1e-6, atol=0)


def test_every_token_passes_before_the_first_update() -> None:
    threshold = empty(3).value(0.99)
    assert threshold.tolist() == [-torch.inf] * 3
    scores = normal(20, 3) * 1e6
    assert above_threshold(scores, threshold).all()
    padding = torch.arange(20) >= 15
    assert torch.equal(above_threshold(scores, threshold, padding).any(dim=1), ~padding)


def test_an_update_leaves_the_average_it_came_from_and_holds_no_graph() -> None:
    old = empty(2)
    new = old.updated(normal(2).requires_grad_(), 0.9)
    assert old.updates == 0
    assert old.total.tolist() == [0.0, 0.0]
    assert new.updates == 1
    assert new.updates.dtype == torch.int64
    assert not new.total.requires_grad
    assert new.updated(normal(2).double(), 0.9).total.dtype == torch.float32


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 30), e=st.integers(1, 6), seed=st.integers(0, 99))
def test_tokens_pass_as_in_the_obvious_loop(n: int, e: int, seed: int) -> None:
    scores, threshold = normal(n, e, seed=seed).round(decimals=1), normal(e).round(decimals=1)
    padding = normal(n, seed=seed + 1) > 0
    free, padded = above_threshold(scores, threshold), above_threshold(scores, threshold, padding)
    for i in range(n):
        for j in range(e):
            assert free[i, j] == (scores[i, j] > threshold[j])
            assert padded[i, j] == (scores[i, j] > threshold[j] and not padding[i])


def test_a_token_at_the_threshold_does_not_pass() -> None:
    threshold = torch.tensor([0.5, -1.0])
    assert not above_threshold(threshold[None], threshold).any()


def test_a_token_passes_or_not_whoever_it_is_batched_with() -> None:
    scores, threshold = normal(64, 8), normal(8, seed=1) * 0.5
    whole = above_threshold(scores, threshold)
    alone = torch.cat([above_threshold(row, threshold) for row in scores.split(1)])
    assert torch.equal(whole, alone)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(above_threshold(scores[order], threshold), whole[order])
    changed = scores.clone()
    changed[32:] = 9.0
    assert torch.equal(above_threshold(changed, threshold)[:32], whole[:32])
    assert not torch.equal(  # as expert choice does not
        as_mask(choose_tokens(changed, 8).token_index, 64)[:32],
        as_mask(choose_tokens(scores, 8).token_index, 64)[:32],
    )


def test_loads_come_near_the_capacity_where_scores_stay_alike() -> None:
    n, e, capacity, decay = 4096, 4, 1024, 0.95
    spread, centre = torch.tensor([0.1, 1.0, 3.0, 10.0]), torch.tensor([5.0, 0.0, -2.0, 1.0])
    average = empty(e)
    for step in range(60):
        scores = normal(n, e, seed=step) * spread + centre
        average = average.updated(choose_tokens(scores, capacity).kth_score, decay)
    threshold = average.value(decay)
    quantile = torch.distributions.Normal(centre, spread).icdf(torch.tensor(0.75))
    assert ((threshold - quantile).abs() < 0.02 * spread).all()
    fresh = normal(4 * n, e, seed=999) * spread + centre
    load = above_threshold(fresh, threshold).sum(dim=0) / 4
    assert ((load / capacity - 1).abs() < 0.05).all()


def test_the_average_follows_scores_that_drift() -> None:
    decay = 0.9
    seen = torch.cat([torch.zeros(50, 1), torch.ones(50, 1)])
    value = average_of(seen, decay).value(decay)
    torch.testing.assert_close(value, torch.tensor([1 - decay**50]), rtol=1e-4, atol=0)
