"""Weights of the experts at every token, from what they said of the tokens before it.

w_t(e) ∝ prior(e) · Π_{s<t} p_e(x_s)^τ: Bayes' rule with a tempered likelihood (DEMix,
arXiv:2108.05036, section 5; τ < 1 keeps the posterior from settling after a few tokens). Token t
never enters its own weight, so mixing with these weights is a language model: causal, normalised.

Everything is computed in float32, or in float64 when given float64.
"""

import torch
from torch import Tensor

from pyper.routing.precision import widen


def posterior_log_weights(
    token_log_probs: Tensor, *, temperature: float, prior: Tensor | None = None
) -> Tensor:
    """Log weights (..., T, E) *before* each token is seen, from log p_e(x_t) (..., T, E) in nats.

    `prior` (E,) holds probabilities (uniform by default; zero switches an expert off) and is the
    weight at t = 0.
    """
    evidence = temperature * widen(token_log_probs)
    # shifted, then summed: subtracting token t from a sum that holds it would leak its rounding
    earlier = torch.cat([torch.zeros_like(evidence[..., :1, :]), evidence[..., :-1, :]], dim=-2)
    scores = earlier.cumsum(dim=-2)[..., : evidence.shape[-2], :]
    if prior is not None:
        scores = scores + prior.to(scores).log()
    return scores.log_softmax(dim=-1)


def update_posterior(log_weights: Tensor, token_log_probs: Tensor, temperature: float) -> Tensor:
    """Log weights (..., E) after one more token, from log p_e(x_t) (..., E): one step of Bayes."""
    return (widen(log_weights) + temperature * widen(token_log_probs)).log_softmax(dim=-1)


def keep_top_k(log_weights: Tensor, k: int) -> Tensor:
    """The k largest of (..., E) renormalised, the others −inf; of equals the lower index stays."""
    order = log_weights.argsort(dim=-1, descending=True, stable=True)
    dropped = torch.zeros_like(log_weights, dtype=torch.bool)
    dropped = dropped.scatter(-1, order[..., k:], value=True)
    return _renormalise(log_weights, dropped)


def prune(log_weights: Tensor, threshold: float) -> Tensor:
    """Weights (..., E) below `threshold` (a probability) become −inf; the best always stays."""
    weights = widen(log_weights).log_softmax(dim=-1)
    best = torch.nn.functional.one_hot(weights.argmax(dim=-1), weights.shape[-1]).bool()
    return _renormalise(log_weights, (weights.exp() < threshold) & ~best)


def mix_log_probs(log_weights: Tensor, log_probs: Tensor) -> Tensor:
    """log Σ_e w_e p_e: probabilities are mixed, not logits.

    `log_weights` (..., E) with `log_probs` (..., E, V) gives (..., V); with `log_probs` (..., E),
    the observed tokens', it gives (...).
    """
    if log_probs.ndim == log_weights.ndim + 1:
        return torch.logsumexp(widen(log_weights).unsqueeze(-1) + widen(log_probs), dim=-2)
    return torch.logsumexp(widen(log_weights) + widen(log_probs), dim=-1)


def _renormalise(log_weights: Tensor, dropped: Tensor) -> Tensor:
    return widen(log_weights).masked_fill(dropped, -torch.inf).log_softmax(dim=-1)
