import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyper.routing import route_prefix, route_windows, scaled_prices


def scores(n: int = 5, t: int = 12, e: int = 3) -> Tensor:
    return -5 * torch.rand(n, t, e, generator=torch.Generator().manual_seed(0))


def test_prices_shrink_with_the_length_of_the_prefix() -> None:
    prices = torch.tensor([0.0, 64.0])
    assert scaled_prices(prices, 16, 512, 1.0).tolist() == [0.0, 2.0]
    assert scaled_prices(prices, 16, 512, 0.5).tolist() == [0.0, 1.0]
    several = scaled_prices(prices, torch.tensor([16, 512]), 512, 1.0)
    assert several.tolist() == [[0.0, 2.0], [0.0, 64.0]]


def test_a_prefix_goes_to_the_expert_that_scores_it_best() -> None:
    x = scores()
    for m in (1, 4, 12, 20):
        expected = [int(x[n, :m].sum(0).argmax()) for n in range(len(x))]
        assert route_prefix(x, m).tolist() == expected
    dear = torch.tensor([0.0, 1e6, 1e6])
    assert route_prefix(x, 4, prices=dear).tolist() == [0] * 5
    each = torch.tensor([[1e6, 0, 1e6]]).repeat(5, 1)
    assert route_prefix(x, 4, prices=each).tolist() == [1] * 5


def test_tokens_after_the_prefix_do_not_matter() -> None:
    x = scores()
    changed = x.clone()
    changed[:, 4:] = changed[:, 4:].flip(-1) * 9
    assert torch.equal(route_prefix(x, 4), route_prefix(changed, 4))


@settings(max_examples=40, deadline=None)
@given(t=st.integers(1, 13), window=st.integers(1, 15))
def test_windows_match_the_obvious_loop(t: int, window: int) -> None:
    x = scores(t=t)
    got = route_windows(x, window)
    assert got.shape == (5, t)
    for position in range(t):
        start = (position // window - 1) * window
        expected = [-1] * 5
        if start >= 0:
            expected = x[:, start : start + window].sum(1).argmax(-1).tolist()
        assert got[:, position].tolist() == expected


def test_windows_pay_prices() -> None:
    x, dear = scores(), torch.tensor([0.0, 2.0, 4.0])
    got = route_windows(x, 3, prices=dear)
    for position in range(3, 12):
        start = (position // 3 - 1) * 3
        expected = (x[:, start : start + 3].sum(1) - dear).argmax(-1)
        assert torch.equal(got[:, position], expected)
    assert not torch.equal(got, route_windows(x, 3))
    assert route_windows(x, 3, prices=1e6 * dear)[:, 3:].eq(0).all()


@pytest.mark.parametrize("position", [0, 5, 6, 11])
def test_a_token_changes_no_choice_up_to_its_own_window(position: int) -> None:
    x = scores()
    changed = x.clone()
    changed[:, position] = torch.tensor([-99.0, 99.0, -99.0])
    before, after = route_windows(x, 3), route_windows(changed, 3)
    same = slice(0, (position // 3 + 1) * 3)
    assert torch.equal(before[:, same], after[:, same])
