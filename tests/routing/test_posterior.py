import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyper.routing import (
    keep_top_k,
    mix_log_probs,
    posterior_log_weights,
    prune,
    update_posterior,
)


def log_probs(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -5 * torch.rand(*shape, generator=generator, dtype=dtype)


shapes = {"b": st.integers(1, 3), "t": st.integers(1, 9), "e": st.integers(1, 5)}


@settings(max_examples=30, deadline=None)
@given(**shapes, temperature=st.sampled_from([0.1, 0.5, 1.0]))
def test_posterior_matches_the_obvious_loop(b: int, t: int, e: int, temperature: float) -> None:
    seen = log_probs(b, t, e)
    prior = torch.arange(1, e + 1).double()
    got = posterior_log_weights(seen, temperature=temperature, prior=prior)
    for i in range(b):
        for position in range(t):
            w = prior.clone()
            for earlier in range(position):
                w = w * seen[i, earlier].exp() ** temperature
            torch.testing.assert_close(got[i, position].exp(), w / w.sum())


@settings(max_examples=20, deadline=None)
@given(**shapes)
def test_iterated_updates_equal_the_whole(b: int, t: int, e: int) -> None:
    seen = log_probs(b, t, e)
    whole = posterior_log_weights(seen, temperature=0.3)
    step = torch.full((b, e), 1 / e, dtype=torch.float64).log()
    for position in range(t):
        torch.testing.assert_close(step, whole[:, position])
        step = update_posterior(step, seen[:, position], 0.3)


@pytest.mark.parametrize("position", [0, 3, 7])
def test_a_token_changes_only_later_weights(position: int) -> None:
    seen = log_probs(2, 8, 4, dtype=torch.float32)
    changed = seen.clone()
    changed[:, position, 1] -= 3.0
    before, after = (posterior_log_weights(x, temperature=0.1) for x in (seen, changed))
    assert torch.equal(before[:, : position + 1], after[:, : position + 1])
    later = slice(position + 1, None)
    assert position == 7 or (before[:, later] != after[:, later]).any(dim=-1).all()


def test_the_first_weight_is_the_prior_and_zero_switches_off() -> None:
    prior = torch.tensor([0.5, 0.0, 0.5])
    got = posterior_log_weights(log_probs(6, 3).float(), temperature=1.0, prior=prior)
    assert torch.equal(got[0].exp(), prior)
    assert (got[:, 1] == -torch.inf).all()


def test_an_impossible_token_ends_an_expert() -> None:
    seen = log_probs(4, 2).float()
    seen[1, 0] = -torch.inf
    got = posterior_log_weights(seen, temperature=0.5)
    assert got[2:, 0].tolist() == [-torch.inf] * 2
    assert got[2:, 1].tolist() == [0.0] * 2
    assert got[:2].isfinite().all()


def test_narrow_types_are_summed_in_float32() -> None:
    seen = log_probs(2000, 2).bfloat16()
    got = posterior_log_weights(seen, temperature=1.0)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, posterior_log_weights(seen.float(), temperature=1.0))


def test_gradients_agree_with_finite_differences() -> None:
    seen = log_probs(2, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: posterior_log_weights(x, temperature=0.4), seen)
    weights = log_probs(2, 3, seed=1).log_softmax(-1).requires_grad_()
    step = log_probs(2, 3, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda w, x: update_posterior(w, x, 0.4), (weights, step))
    assert torch.autograd.gradcheck(mix_log_probs, (weights, step))
    vocabulary = log_probs(2, 3, 5, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(mix_log_probs, (weights, vocabulary))
    assert torch.autograd.gradcheck(lambda w: keep_top_k(w, 2)[w > w.amin(-1, True)], (weights,))


@settings(max_examples=20, deadline=None)
@given(b=st.integers(1, 3), e=st.integers(1, 5), v=st.integers(1, 6))
def test_mixing_adds_probabilities(b: int, e: int, v: int) -> None:
    weights = log_probs(b, e).log_softmax(-1)
    experts = log_probs(b, e, v, seed=1).log_softmax(-1)
    mixed = mix_log_probs(weights, experts)
    expected = sum(weights[:, i, None].exp() * experts[:, i].exp() for i in range(e))
    torch.testing.assert_close(mixed.exp(), expected)
    torch.testing.assert_close(mixed.exp().sum(-1), torch.ones(b, dtype=torch.float64))
    torch.testing.assert_close(mix_log_probs(weights, experts[..., 0]), mixed[..., 0])


def test_mixing_is_done_in_float32() -> None:
    weights = torch.tensor([0.5, 0.5]).log()
    mixed = mix_log_probs(weights, torch.tensor([-200.0, -300.0]).bfloat16())
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, torch.tensor(-200.0) + torch.tensor(0.5).log())


def test_a_pruned_expert_takes_no_part_and_no_gradient() -> None:
    weights = keep_top_k(log_probs(1, 3).log_softmax(-1), 2)
    experts = log_probs(1, 3, 4, seed=1).requires_grad_()
    mix_log_probs(weights, experts).sum().backward()
    assert experts.grad is not None
    gone = weights[0] == -torch.inf
    assert (experts.grad[0, gone] == 0).all()
    assert (experts.grad[0, ~gone] > 0).all()


def test_top_k_keeps_the_lower_index_of_equals() -> None:
    kept = keep_top_k(torch.tensor([[0.2, 0.3, 0.3, 0.2]]).log(), 3)
    torch.testing.assert_close(kept.exp(), torch.tensor([[0.25, 0.375, 0.375, 0.0]]))
    assert torch.equal(keep_top_k(kept, 9).exp() > 0, kept.exp() > 0)


def test_pruning_drops_small_weights_but_never_the_best() -> None:
    weights = torch.tensor([[0.9, 0.06, 0.04], [0.4, 0.35, 0.25]]).log()
    got = prune(weights, 0.05).exp()
    torch.testing.assert_close(got[0], torch.tensor([0.9375, 0.0625, 0.0]))
    torch.testing.assert_close(got[1], weights[1].exp())
    assert prune(weights, 0.5)[1].tolist() == [0.0, -torch.inf, -torch.inf]
