"""Mixing rules: weights of the experts at every position, from scores of earlier positions.

Scores are aligned with predictions: entry t is log p_e(x_{t+1} | x_≤t), so the weights of
prediction t may use entries before t only. Every rule keeps to that.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pyper.mixture.settings import MixtureSettings
from pyper.routing import (
    keep_top_k,
    posterior_log_weights,
    route_prefix,
    route_windows,
    scaled_prices,
)


def mixing_log_weights(
    settings: MixtureSettings, expert_scores: Tensor, router_scores: Tensor
) -> Tensor:
    """Log weights (B, T, E) of the configured rule.

    expert_scores (B, T, E): the experts' own log-probabilities of the observed tokens (only those
    of the cold start are used by `top1`); router_scores (B, T, E): the router's. The first T − 1
    entries matter; the last one may be anything.
    """
    rule = {
        "posterior": partial(posterior_rule, top_k=settings.top_k),
        "top1": partial(
            prefix_rule,
            router_scores=router_scores,
            prefix_tokens=settings.prefix_tokens,
            prices=inference_prices(settings),
        ),
        "window": partial(
            window_rule,
            router_scores=router_scores,
            window=settings.window,
            prices=inference_prices(settings),
        ),
    }[settings.mixing]
    return rule(expert_scores, temperature=settings.temperature)


def posterior_rule(expert_scores: Tensor, *, temperature: float, top_k: int) -> Tensor:
    """At every position the `top_k` experts with the largest posterior weights."""
    log_weights = posterior_log_weights(expert_scores, temperature=temperature)
    return keep_top_k(log_weights, min(top_k, log_weights.shape[-1]))


def prefix_rule(
    expert_scores: Tensor,
    *,
    router_scores: Tensor,
    prefix_tokens: int,
    temperature: float,
    prices: Tensor | None = None,
) -> Tensor:
    """One expert from prediction `prefix_tokens` on, chosen by the tokens before it.

    Before that the cold start: the posterior over what has been seen so far.
    """
    due = _prices_of(prices, prefix_tokens, router_scores)
    chosen = route_prefix(router_scores, prefix_tokens, prices=due)
    T = expert_scores.shape[1]
    decided = one_expert(chosen[:, None].expand(-1, T), expert_scores)
    return _after_cold_start(expert_scores, decided, prefix_tokens, temperature)


def window_rule(
    expert_scores: Tensor,
    *,
    router_scores: Tensor,
    window: int,
    temperature: float,
    prices: Tensor | None = None,
) -> Tensor:
    """One expert per window, chosen by the window before it; the first is a cold start."""
    due = _prices_of(prices, window, router_scores)
    chosen = route_windows(router_scores, window, prices=due)
    decided = one_expert(chosen.clamp(min=0), expert_scores)
    return _after_cold_start(expert_scores, decided, window, temperature)


def _prices_of(prices: Tensor | None, n_tokens: int, scores: Tensor) -> Tensor | None:
    """What `n_tokens` cost (E,), of prices per token."""
    if prices is None:
        return None
    return scaled_prices(prices.to(scores), n_tokens, reference_length=1)


def _after_cold_start(scores: Tensor, decided: Tensor, n_cold: int, temperature: float) -> Tensor:
    cold = posterior_log_weights(scores[:, :n_cold], temperature=temperature)
    return torch.cat([cold, decided[:, n_cold:]], dim=1)


def one_expert(chosen: Tensor, like: Tensor) -> Tensor:
    """Log weights (B, T, E) that give everything to one expert (B, T)."""
    n_experts, dtype = like.shape[-1], torch.promote_types(like.dtype, torch.float32)
    return F.one_hot(chosen, n_experts).to(dtype).log()


def inference_prices(settings: MixtureSettings) -> Tensor | None:
    """Prices (E,) in nats per token as applied at inference; None routes for quality alone."""
    if not settings.prices or settings.price_scale == 0:
        return None
    return settings.price_scale * torch.tensor(settings.prices, dtype=torch.float64)
