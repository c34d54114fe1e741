from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyper.errors import DataError
from pyper.routing import as_mask, capacity_of, choose_tokens, router_probs

shapes = {"n": st.integers(1, 40), "e": st.integers(1, 9), "seed": st.integers(0, 99)}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some_padding(n: int, seed: int) -> Tensor:
    """(N,), one real token at least."""
    padding = normal(n, seed=seed + 1000) > 0.3
    padding[seed % n] = False
    return padding


@settings(max_examples=40, deadline=None)
@given(**shapes, data=st.data())
def test_each_expert_takes_its_highest_tokens_as_in_the_obvious_loop(
    n: int, e: int, seed: int, data: st.DataObject
) -> None:
    capacity = data.draw(st.integers(1, n))
    scores = normal(n, e, seed=seed)
    found = choose_tokens(scores, capacity)
    assert found.token_index.shape == (e, capacity)
    assert found.token_index.dtype == torch.int64
    for expert in range(e):
        column = scores[:, expert].tolist()
        best = sorted(range(n), key=lambda i: -column[i])[:capacity]
        assert found.token_index[expert].tolist() == best
        assert found.kth_score[expert] == column[best[-1]]


@settings(max_examples=40, deadline=None)
@given(**shapes, data=st.data())
def test_each_expert_takes_exactly_its_capacity_of_tokens_that_are_there(
    n: int, e: int, seed: int, data: st.DataObject
) -> None:
    padding = some_padding(n, seed)
    capacity = data.draw(st.integers(1, int((~padding).sum())))
    scores = normal(n, e, seed=seed).round()  # ties
    scores[padding] = 99.0  # what stands there must not matter
    found = choose_tokens(scores, capacity, padding)
    for chosen in found.token_index:
        assert len(set(chosen.tolist())) == capacity
        assert not padding[chosen].any()
    assert (found.kth_score < 99).all()
    real = choose_tokens(scores[~padding], capacity)
    assert torch.equal(found.kth_score, real.kth_score)


@settings(max_examples=40, deadline=None)
@given(**shapes, data=st.data())
def test_the_kth_score_is_the_threshold_that_gives_the_choice(
    n: int, e: int, seed: int, data: st.DataObject
) -> None:
    capacity = data.draw(st.integers(1, n))
    scores = normal(n, e, seed=seed)
    found = choose_tokens(scores, capacity)
    chosen = as_mask(found.token_index, n)
    assert torch.equal(scores >= found.kth_score, chosen)
    assert ((scores > found.kth_score).sum(dim=0) == capacity - 1).all()  # all but the k-th itself


@settings(max_examples=30, deadline=None)
@given(**shapes)
def test_a_mask_holds_what_the_indices_hold(n: int, e: int, seed: int) -> None:
    index = choose_tokens(normal(n, e, seed=seed), max(n // 2, 1)).token_index
    mask = as_mask(index, n)
    assert mask.shape == (n, e)
    assert mask.dtype == torch.bool
    for expert in range(e):
        taken = mask[:, expert].nonzero().squeeze(1).tolist()
        assert taken == sorted(index[expert].tolist())


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(1, 70_000),
    e=st.integers(1, 64),
    factor=st.one_of(st.sampled_from([0.29, 0.5, 1.0, 1.25, 2.0]), st.floats(0.1, 8).map(float)),
)
def test_the_capacity_is_the_product_rounded_down(n: int, e: int, factor: float) -> None:
    factor = round(min(factor, e), 2)
    exact = Fraction(str(factor)) * n / e
    if exact < 1:
        with pytest.raises(DataError):
            capacity_of(n, e, factor)
    else:
        assert capacity_of(n, e, factor) == exact // 1


def test_the_capacity_never_exceeds_the_pool() -> None:
    assert capacity_of(100, 1, 0.29) == 29  # 0.29 · 100 < 29 in floating point
    assert capacity_of(10, 2, 2.0) == 10
    assert capacity_of(10, 2, 5.0) == 10


def test_a_pool_too_small_for_the_experts_is_refused_with_a_way_out() -> None:
    assert capacity_of(8, 8, 1.0) == 1
    message = "a pool of 7 tokens gives none of 8 experts a token at `capacity_factor` 1"
    with pytest.raises(DataError, match=message) as caught:
        capacity_of(7, 8, 1.0)
    assert "train.micro_batch_size" in caught.value.hint


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_gates_are_over_the_experts_of_one_token(gate: str) -> None:
    logits = normal(6, 4)
    got = router_probs(logits, gate)
    for n in range(6):
        for e in range(4):
            odds = logits[n, e].exp()
            total = logits[n].exp().sum() if gate == "softmax" else 1 + odds
            torch.testing.assert_close(got[n, e], odds / total)
    changed = logits.clone()
    changed[3] += 1 + normal(4, seed=1)
    others = torch.arange(6) != 3
    assert torch.equal(router_probs(changed, gate)[others], got[others])


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_gradients_pass_through_the_gates_and_not_through_the_choice(gate: str) -> None:
    logits = normal(10, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: router_probs(x, gate), logits)

    def taken_gates(x: Tensor) -> Tensor:
        probs = router_probs(x, gate)
        return probs.T.gather(1, choose_tokens(probs, 4).token_index)

    assert torch.autograd.gradcheck(taken_gates, logits)
    assert not choose_tokens(router_probs(logits, gate), 4).kth_score.requires_grad
    taken_gates(logits).sum().backward()
    read = as_mask(choose_tokens(router_probs(logits, gate), 4).token_index, 10)
    if gate == "sigmoid":  # an expert's logit moves its own gate alone
        assert torch.equal(logits.grad != 0, read)
    else:
        assert torch.equal((logits.grad != 0).any(dim=1), read.any(dim=1))


def test_a_later_token_takes_the_place_of_an_earlier_one() -> None:
    scores = normal(16, 2)
    scores[15] = -9.0
    before = as_mask(choose_tokens(scores, 4).token_index, 16)
    changed = scores.clone()
    changed[15] = 9.0
    after = as_mask(choose_tokens(changed, 4).token_index, 16)
    assert not before[15].any()
    lost = before[:15] & ~after[:15]
    assert lost.sum(dim=0).tolist() == [1, 1]  # not causal: nothing about those tokens changed
