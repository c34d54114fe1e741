"""`Mixture.log_probs` is a normalised language model, and does what its settings say."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mixture.small_mixtures import MODES, ROUTERS, small_counts, small_mixture
from nn.small_experts import BOS, text_of
from pyper.mixture import LMRouter, Mixture, UnigramRouter
from pyper.mixture.router import smoothed_log_probs

LENGTH = 20


def document(batch: int, length: int = LENGTH, seed: int = 0) -> Tensor:
    tokens = text_of(batch, length, seed=seed)
    tokens[:, 0] = BOS
    return tokens


def naive_unigram(mixture: Mixture, expert: int, token: int) -> float:
    counts = small_counts()
    overall = counts.sum(0) + 1
    row = [int(counts[expert, v]) + 0.1 * 17 * float(overall[v] / overall.sum()) for v in range(17)]
    return math.log(row[token] / sum(row))


@torch.no_grad()
def naive_log_probs(mixture: Mixture, text: list[int]) -> list[Tensor]:
    """One token after the other; nothing is ever shown that is not yet written."""
    settings, n = mixture.settings, mixture.n_experts
    own: list[list[float]] = []  # [s][e]: how likely expert e found token s + 1
    read: list[list[float]] = []  # the same by the router
    predictions = []
    for t in range(len(text)):
        seen = torch.tensor([text[: t + 1]])
        said = [mixture.expert(e)(seen)[0, -1].log_softmax(-1) for e in range(n)]
        evidence = [settings.temperature * sum(s[e] for s in own) for e in range(n)]
        weights = torch.tensor(evidence).softmax(0).tolist()
        if settings.mixing == "posterior":
            best = sorted(range(n), key=lambda e: -weights[e])[: settings.top_k]
            weights = [weights[e] if e in best else 0.0 for e in range(n)]
        elif settings.mixing == "top1" and t >= settings.prefix_tokens:
            weights = the_best(read[: settings.prefix_tokens], token_prices(mixture))
        elif settings.mixing == "window" and t >= settings.window:
            start = (t // settings.window - 1) * settings.window
            weights = the_best(read[start : start + settings.window], token_prices(mixture))
        mixed = sum(w / sum(weights) * p.exp() for w, p in zip(weights, said, strict=True))
        predictions.append(mixed.log())
        if t + 1 < len(text):
            after = text[t + 1]
            own.append([float(p[after]) for p in said])
            read.append(naive_router(mixture, seen, after, own[-1]))
    return predictions


def token_prices(mixture: Mixture) -> list[float]:
    settings = mixture.settings
    return [settings.price_scale * p for p in settings.prices] or [0.0] * mixture.n_experts


def the_best(scores: list[list[float]], prices: list[float]) -> list[float]:
    """Who has the largest sum of scores, each of which costs the price."""
    totals = [sum(s[e] - prices[e] for s in scores) for e in range(len(prices))]
    return [float(total == max(totals)) for total in totals]


def naive_router(mixture: Mixture, seen: Tensor, after: int, own: list[float]) -> list[float]:
    if isinstance(mixture.router, UnigramRouter):
        return [naive_unigram(mixture, e, after) for e in range(mixture.n_experts)]
    if isinstance(mixture.router, LMRouter):
        return [float(m(seen)[0, -1].log_softmax(-1)[after]) for m in mixture.router.models]
    return own


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("router", ROUTERS)
def test_scoring_matches_the_obvious_loop(mode: dict[str, Any], router: str) -> None:
    mixture, tokens = small_mixture(router, **mode), document(2)
    got = mixture.log_probs(tokens)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.exp().sum(-1), torch.ones(2, LENGTH), atol=1e-5, rtol=0)
    for row in range(2):
        expected = torch.stack(naive_log_probs(mixture, tokens[row].tolist()))
        torch.testing.assert_close(got[row], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("mixing", "n_cold"), [("top1", 6), ("window", 5)])
def test_prices_enter_the_obvious_loop(mixing: str, n_cold: int) -> None:
    changes = {"mixing": mixing, "price_scale": 0.5, "prices": (0.9, -0.4, 0.3, -0.8)}
    mixture, tokens = small_mixture(**changes), document(6)
    got = mixture.log_probs(tokens)
    for row in range(6):
        expected = torch.stack(naive_log_probs(mixture, tokens[row].tolist()))
        torch.testing.assert_close(got[row], expected, atol=1e-5, rtol=1e-5)
    free = small_mixture(mixing=mixing).log_probs(tokens)
    assert not torch.equal(got[:, n_cold:], free[:, n_cold:])
    assert torch.equal(got[:, :n_cold], free[:, :n_cold])  # the cold start has no prices


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("length", [1, 2, 6, 7])
def test_texts_around_the_prefix_length_are_normalised(
    mode: dict[str, Any], router: str, length: int
) -> None:
    mixture = small_mixture(router, **mode)
    got = mixture.log_probs(document(3, length))
    torch.testing.assert_close(got.exp().sum(-1), torch.ones(3, length), atol=1e-5, rtol=0)
    first = mixture.log_weights(document(3, length))[:, 0].exp()
    n_used = mixture.settings.top_k if mode["mixing"] == "posterior" else 4
    assert (first > 0).sum(-1).tolist() == [n_used] * 3
    torch.testing.assert_close(first.max(-1).values, torch.full((3,), 1 / n_used))


@pytest.mark.parametrize("mixing", ["top1", "window"])
def test_one_expert_runs_after_the_cold_start(mixing: str) -> None:
    mixture = small_mixture(mixing=mixing)
    weights = mixture.log_weights(document(16)).exp()
    n_cold = 6 if mixing == "top1" else 5
    assert ((weights == 0) | (weights == 1))[:, n_cold:].all()
    assert (weights[:, 1:n_cold] < 1).all()
    chosen = weights[:, n_cold:].argmax(-1)
    assert len(chosen.unique()) > 1
    assert (chosen == chosen[:, :1]).all().item() is (mixing == "top1")


@pytest.mark.parametrize("mixing", ["top1", "window"])
def test_the_cold_start_weighs_by_what_was_seen(mixing: str) -> None:
    n_cold = 6 if mixing == "top1" else 5
    cold = small_mixture(mixing=mixing).log_weights(document(3))[:, :n_cold]
    posterior = small_mixture(mixing="posterior", top_k=4).log_weights(document(3))
    torch.testing.assert_close(cold, posterior[:, :n_cold])


def margin_between_the_best_two(mixture: Mixture, tokens: Tensor) -> tuple[int, int, float]:
    """The best and second expert of a prefix, and how far they are apart in nats per token."""
    assert mixture.router is not None
    n_read = mixture.settings.prefix_tokens
    mean = mixture.router.token_scores(tokens)[0, :n_read].mean(0)
    first, second = mean.topk(2).indices.tolist()
    return first, second, float(mean[first] - mean[second])


@pytest.mark.parametrize("prefix_tokens", [3, 12])
def test_prices_are_per_token_of_the_prefix(prefix_tokens: int) -> None:
    plain = small_mixture(mixing="top1", prefix_tokens=prefix_tokens)
    tokens = document(1)
    first, second, margin = margin_between_the_best_two(plain, tokens)
    assert plain.route(tokens[0]) == first
    for share, expected in ((0.9, first), (1.1, second)):
        prices = [0.0] * 4
        prices[first] = 2 * share * margin
        changes = {"mixing": "top1", "prefix_tokens": prefix_tokens, "prices": tuple(prices)}
        priced = small_mixture(**changes, price_scale=0.5)
        assert priced.route(tokens[0]) == expected
        assert int(priced.log_weights(tokens)[0, -1].argmax()) == expected
        assert small_mixture(**changes, price_scale=0.0).route(tokens[0]) == first


@pytest.mark.parametrize("router", ["unigram", "lm"])
def test_routing_a_prompt_agrees_with_scoring_it(router: str) -> None:
    mixture = small_mixture(router, mixing="top1")
    for row in document(8):
        assert mixture.route(row) == int(mixture.log_weights(row[None])[0, -1].argmax())
        assert mixture.route(row[:7]) == mixture.route(row)
        assert mixture.route(row[:6]) is None


def test_only_top1_with_its_own_router_settles_on_one_expert() -> None:
    text = document(1)[0]
    assert small_mixture("experts", mixing="top1").route(text) is None
    assert small_mixture(mixing="posterior").route(text) is None
    assert small_mixture(mixing="window").route(text) is None


def test_unigram_router_scores_the_next_token() -> None:
    mixture, tokens = small_mixture(), document(2, 9)
    assert mixture.router is not None
    got = mixture.router.token_scores(tokens)
    assert got.shape == (2, 8, 4)
    for row in range(2):
        for t in range(8):
            expected = [naive_unigram(mixture, e, int(tokens[row, t + 1])) for e in range(4)]
            torch.testing.assert_close(got[row, t], torch.tensor(expected))


def test_unread_tokens_stay_possible_for_every_expert() -> None:
    counts = torch.zeros(3, 10)
    counts[0, 2] = 1e9
    log_probs = smoothed_log_probs(counts.double())
    assert log_probs.isfinite().all()
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(3, dtype=torch.float64))
