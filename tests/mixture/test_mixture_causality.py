"""No mode lets a token into the prediction of itself or of anything before it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mixture.small_mixtures import MODES, ROUTERS, small_mixture
from nn.small_experts import BOS, change_from, text_of
from pyper.mixture import Mixture
from pyper.mixture.mixing import one_expert
from pyper.routing import mix_log_probs, posterior_log_weights

N_TEXTS, LENGTH = 12, 24
N_CUTS = N_TEXTS * (LENGTH - 1)


def moved_by_a_change(score: Callable[[Tensor], Tensor]) -> tuple[int, int]:
    """Predictions (B, T, …) of `score` that tokens after them moved, and tokens before them."""
    texts = text_of(N_TEXTS, LENGTH)
    texts[:, 0] = BOS
    # Every cut of every text: a decision one token late shows at one cut only.
    tokens = texts.repeat_interleave(LENGTH - 1, dim=0)
    cuts = torch.arange(1, LENGTH).repeat(N_TEXTS)
    before, after = score(tokens), score(change_from(tokens, cuts))
    moved = (before != after).flatten(2).any(-1)
    earlier = torch.arange(LENGTH) < cuts[:, None]
    return int((moved & earlier).sum()), int((moved & ~earlier).sum())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("router", ROUTERS)
def test_a_change_moves_no_earlier_prediction(mode: dict[str, Any], router: str) -> None:
    mixture = small_mixture(router, **mode)
    earlier, later = moved_by_a_change(mixture.log_probs)
    assert earlier == 0
    assert later > N_CUTS * LENGTH / 3
    # The weights themselves move too, or this would only test the experts.
    earlier, later = moved_by_a_change(mixture.log_weights)
    assert earlier == 0
    assert later > N_CUTS


@pytest.mark.parametrize("mixing", ["top1", "window"])
def test_prices_at_inference_do_not_look_ahead(mixing: str) -> None:
    prices = {"prices": (0.3, -0.1, 0.0, -0.2), "price_scale": 1.0}
    assert moved_by_a_change(small_mixture(mixing=mixing, **prices).log_probs)[0] == 0


def said_and_scores(mixture: Mixture, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """log p (B, T, E, V) of all experts, and of the observed tokens (B, T, E)."""
    models = [mixture.expert(e) for e in range(4)]
    said = torch.stack([m(tokens).log_softmax(-1) for m in models], dim=-2)
    observed = tokens[:, 1:, None, None].expand(-1, -1, 4, 1)
    scores = said[:, :-1].gather(-1, observed).squeeze(-1)
    return said, torch.nn.functional.pad(scores, (0, 0, 0, 1))


@torch.no_grad()
def oracle_log_probs(tokens: Tensor) -> Tensor:
    """The best expert of the whole text: not a language model."""
    said, scores = said_and_scores(small_mixture(), tokens)
    best = scores.sum(1).argmax(-1)[:, None].expand(tokens.shape)
    return mix_log_probs(one_expert(best, scores), said)


@torch.no_grad()
def one_token_late_log_probs(tokens: Tensor) -> Tensor:
    """The posterior after the predicted token was seen."""
    said, scores = said_and_scores(small_mixture(), tokens)
    weights = posterior_log_weights(scores, temperature=0.2)
    return mix_log_probs(torch.cat([weights[:, 1:], weights[:, -1:]], dim=1), said)


@pytest.mark.parametrize("score", [oracle_log_probs, one_token_late_log_probs])
def test_the_check_sees_routing_that_looks_ahead(score: Callable[[Tensor], Tensor]) -> None:
    assert moved_by_a_change(score)[0] > 0
