"""What evaluation reports of a mode is what the mixture does in it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mixture.small_mixtures import ROUTERS
from mixture.small_scores import (
    PREFIXES,
    PRICES,
    TEMPERATURE,
    mixture_of,
    price_tensor,
    small_held_out,
    small_scores,
)
from nn.small_experts import small_expert
from pyper.errors import DataError
from pyper.evaluate import Scores, fit_temperature, losses_of_modes, score_held_out, token_losses
from pyper.evaluate.mixture_losses import Rows


def rows_of(scores: Scores) -> Rows:
    return losses_of_modes(
        scores, temperature=TEMPERATURE, prefixes=PREFIXES, prices=price_tensor()
    )


def losses_of_the_mixture(tokens: Tensor, router: str, **changes: Any) -> Tensor:
    log_probs = mixture_of(router, **changes).log_probs(tokens[:, :-1])
    return -log_probs.gather(-1, tokens[:, 1:, None]).squeeze(-1)


def assert_same(got: Tensor | None, expected: Tensor) -> None:
    assert got is not None
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("router", ROUTERS)
def test_routed_losses_are_those_of_the_top1_mixture(router: str) -> None:
    for held_out, scores in zip(small_held_out(), small_scores(router), strict=True):
        rows = rows_of(scores)
        for n in PREFIXES:
            settings = {"mixing": "top1", "prefix_tokens": n}
            assert_same(rows.routed[n], losses_of_the_mixture(held_out.tokens, router, **settings))
        settings = {"mixing": "top1", "prefix_tokens": PREFIXES[1]}
        settings |= {"prices": PRICES, "price_scale": 1.0}
        expected = losses_of_the_mixture(held_out.tokens, router, **settings)
        assert_same(rows.routed_with_prices, expected)
        assert not torch.equal(expected, rows.routed[PREFIXES[1]])


@pytest.mark.parametrize(("name", "top_k"), [("top1", 1), ("top2", 2), ("all", 4)])
def test_posterior_losses_are_those_of_the_posterior_mixture(name: str, top_k: int) -> None:
    for held_out, scores in zip(small_held_out(), small_scores(), strict=True):
        expected = losses_of_the_mixture(held_out.tokens, "unigram", top_k=top_k)
        assert_same(rows_of(scores).posterior[name], expected)


def test_single_arms_are_those_of_their_models() -> None:
    for held_out, scores in zip(small_held_out(), small_scores(), strict=True):
        rows, mixture = rows_of(scores), mixture_of()
        for e in range(4):
            assert_same(rows.experts[..., e], token_losses(mixture.expert(e), held_out.tokens))
        assert_same(rows.control, token_losses(small_expert(50), held_out.tokens))
        shards = [token_losses(small_expert(seed), held_out.tokens) for seed in (60, 61, 62)]
        mean = torch.stack([(-loss).exp() for loss in shards]).mean(0)
        assert_same(rows.random_shards, -mean.log())


def test_the_oracle_is_the_best_expert_of_each_window() -> None:
    for scores in small_scores():
        rows = rows_of(scores)
        best = rows.experts.sum(1).min(-1)
        assert_same(rows.oracle.sum(1), best.values)
        for window, expert in enumerate(best.indices.tolist()):
            assert_same(rows.oracle[window], rows.experts[window, :, expert])
        assert (rows.oracle.sum(1)[:, None] <= rows.experts.sum(1) + 1e-4).all()


@pytest.mark.parametrize("router", ROUTERS)
def test_no_routed_row_beats_the_oracle_once_one_expert_runs(router: str) -> None:
    # The cold start mixes experts and may beat the best of them: it is scored by the mixture.
    for scores in small_scores(router):
        rows = rows_of(scores)
        assert rows.routed_with_prices is not None
        routed = [*rows.routed.items(), (PREFIXES[1], rows.routed_with_prices)]
        for n, losses in routed:
            rest = losses[:, n:]
            distance = (rest[..., None] - rows.experts[:, n:]).abs().amax(dim=1)
            assert (distance.min(-1).values < 1e-6).all()  # exactly one expert's
            best = rows.experts[:, n:].sum(1).min(-1).values
            assert (rest.sum(1) >= best - 1e-4).all()


def test_the_load_is_counted_at_the_middle_prefix() -> None:
    for held_out, scores in zip(small_held_out(), small_scores(), strict=True):
        mixture = mixture_of(mixing="top1", prefix_tokens=PREFIXES[1])
        expected = [mixture.route(row) for row in held_out.tokens]
        assert rows_of(scores).chosen.tolist() == expected


def test_entropy_is_that_of_the_posterior() -> None:
    for held_out, scores in zip(small_held_out(), small_scores(), strict=True):
        weights = mixture_of(top_k=4).log_weights(held_out.tokens[:, :-1]).exp()
        assert_same(rows_of(scores).entropy, torch.special.entr(weights).sum(-1))


def test_a_window_shorter_than_the_prefix_is_all_cold_start() -> None:
    for scores in small_scores():
        rows = losses_of_modes(scores, temperature=TEMPERATURE, prefixes=(64,))
        assert_same(rows.routed[64], rows.posterior["all"])
        assert rows.routed_with_prices is None


def test_arms_that_were_not_run_are_none() -> None:
    for scores in small_scores(controls=False):
        rows = losses_of_modes(scores, temperature=TEMPERATURE, prefixes=PREFIXES)
        assert rows.control is None
        assert rows.random_shards is None
        assert rows.routed_with_prices is None


def test_text_without_a_single_window_is_refused() -> None:
    with pytest.raises(DataError, match="no held-out text") as caught:
        score_held_out(mixture_of(), [])
    assert "seq_len" in caught.value.hint


def test_one_expert_in_memory_suffices() -> None:
    mixture = mixture_of(resident=1)
    scores = score_held_out(mixture, small_held_out())
    assert mixture.n_loaded == 1
    for got, expected in zip(scores, small_scores(), strict=True):
        assert torch.equal(got.experts, expected.experts)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_fitted_temperature_is_the_best_of_the_grid(top_k: int) -> None:
    def loss(temperature: float) -> float:
        total = 0.0
        for held_out in small_held_out():
            mixture = mixture_of(top_k=top_k)
            mixture.settings = mixture.settings.model_copy(update={"temperature": temperature})
            log_probs = mixture.log_probs(held_out.tokens[:, :-1])
            total -= float(log_probs.gather(-1, held_out.tokens[:, 1:, None]).sum())
        return total

    losses = {tau: loss(tau) for tau in (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)}
    assert fit_temperature(small_scores(), top_k) == min(losses, key=losses.__getitem__)


def test_experts_that_tell_the_truth_get_a_high_temperature_and_liars_a_low_one() -> None:
    generator = torch.Generator().manual_seed(0)

    def scores(steady: bool) -> Scores:
        """One expert is right all along, or the right one changes at every token."""
        right = torch.zeros(4, 40, dtype=torch.long)
        if not steady:
            right = torch.randint(0, 3, (4, 40), generator=generator)
        experts = torch.full((4, 40, 3), -3.0)
        experts.scatter_(-1, right[..., None], -0.5)
        return Scores("made up", experts, experts, None, None, 1.0)

    assert fit_temperature([scores(steady=True)], 3) == 1.0
    assert fit_temperature([scores(steady=False)], 3) == 0.02
