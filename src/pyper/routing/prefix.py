"""One expert per prefix or per window: what runs when only one expert may."""

import torch
from einops import reduce, repeat
from torch import Tensor

from pyper.routing.precision import widen


def scaled_prices(
    prices: Tensor, n_tokens: int | Tensor, reference_length: int, scale: float = 1.0
) -> Tensor:
    """Prices (E,) learnt on sequences of `reference_length` tokens, for scores of `n_tokens`.

    Scores are sums over tokens, so a price shrinks with the length: full prices on a short prefix
    drown its scores. `scale` is the share applied: 0 routes for quality, 1 for equal load.
    Gives (E,), or (N, E) when `n_tokens` is (N,).
    """
    share = torch.as_tensor(n_tokens, dtype=prices.dtype, device=prices.device) / reference_length
    return scale * share.unsqueeze(-1) * prices


def route_prefix(
    token_log_probs: Tensor, prefix_tokens: int, *, prices: Tensor | None = None
) -> Tensor:
    """The expert (N,) that scores the first tokens best: argmax Σ_{t<M} log p_e(x_t) − price.

    `token_log_probs` (N, T, E) in nats; `prices` (E,) or (N, E) as `scaled_prices` gives them. A
    sequence shorter than the prefix is routed on all of it (pad its rest with zeros).
    """
    scores = reduce(widen(token_log_probs[:, :prefix_tokens]), "n t e -> n e", "sum")
    if prices is not None:
        scores = scores - prices.to(scores)
    return scores.argmax(dim=-1)


def route_windows(token_log_probs: Tensor, window: int, *, prices: Tensor | None = None) -> Tensor:
    """The expert (N, T) of every position, chosen by the window *before* it (DiPaCo,
    arXiv:2403.10616, section 2.4.3).

    `token_log_probs` (N, T, E); `prices` (E,) for `window` tokens, as `scaled_prices` gives them.
    The first window has nothing before it: −1 there, and the caller's cold start decides.
    """
    n, length, _ = token_log_probs.shape
    n_deciding = max(0, (length - 1) // window)  # windows that a later position can look back on
    decided = widen(token_log_probs[:, : n_deciding * window])
    scores = reduce(decided, "n (w t) e -> n w e", "sum", t=window)
    if prices is not None:
        scores = scores - prices.to(scores)
    later = repeat(scores.argmax(dim=-1), "n w -> n (w t)", t=window)
    first = later.new_full((n, min(window, length)), -1)
    return torch.cat([first, later], dim=1)[:, :length]
