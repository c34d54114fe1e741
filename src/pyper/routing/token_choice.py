"""Token choice: each token takes its k highest experts, none dropped; and three ways to balance.

The losses and the quantile update read every row they are given: leave padding out.
"""

import torch
from torch import Tensor


def choose_experts(scores: Tensor, top_k: int, padding: Tensor | None = None) -> Tensor:
    """(N, E) bool: the `top_k` highest experts of each row of scores (N, E)."""
    best = scores.topk(top_k, dim=-1).indices
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)
    return chosen if padding is None else chosen & ~padding[:, None]


def load_balancing_loss(router_probs: Tensor, expert_share: Tensor) -> Tensor:
    """E · Σ_e f_e P_e (arXiv:2101.03961, eq. 4): 1 where both are uniform.

    router_probs: (N, E), rows that sum to 1, of which P is the mean; expert_share: (E,), sums to 1:
    f, the share of the choices that went to each expert, of the whole optimizer step where it is
    known so far.
    """
    n_experts = router_probs.shape[-1]
    return n_experts * (expert_share * router_probs.mean(dim=0)).sum()


def router_z_loss(router_logits: Tensor) -> Tensor:
    """Mean squared log-partition of router logits (N, E) (ST-MoE, arXiv:2202.08906, eq. 5)."""
    return router_logits.logsumexp(dim=-1).square().mean()


def sign_updated_bias(bias: Tensor, expert_load: Tensor, rate: float) -> Tensor:
    """Loss-free balancing: b += rate · sign(mean load − load) (arXiv:2408.15664, algorithm 1).

    bias, expert_load: (E,). The bias enters the choice only, never the gates.
    """
    load = expert_load.to(bias)
    return bias + rate * (load.mean() - load).sign()


def quantile_updated_bias(bias: Tensor, scores: Tensor, top_k: int, rate: float) -> Tensor:
    """Quantile balancing: move each bias towards the one that would have given equal loads.

    Expert e takes token n when S[n, e] + b_e exceeds the k-th highest of the other experts' biased
    scores. The bias that does so for exactly k/E of the tokens is minus the (1 − k/E) quantile of
    that margin. scores: (N, E); all experts move at once, by `rate` of the way. At rate 1 two
    experts that compete pass each other for ever; ½ is safe. Where `top_k` is E every expert takes
    every token whatever the bias, which comes back as it was.
    """
    n_experts = bias.shape[0]
    if top_k == n_experts:
        return bias
    margin = scores - _kth_of_others(scores + bias, top_k)
    exact = -_quantile(margin, 1 - top_k / n_experts)
    moved = bias + rate * (exact - bias)
    return moved - moved.mean()


def _quantile(values: Tensor, share: float) -> Tensor:
    """(E,) of values (N, E), interpolated: `torch.quantile` refuses more than 16 M elements."""
    ordered = values.sort(dim=0).values
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below].lerp(ordered[above], position - below)


def _kth_of_others(biased: Tensor, k: int) -> Tensor:
    """(N, E): for each expert, the k-th highest of the other experts' scores (N, E); k < E."""
    top = biased.topk(k + 1, dim=-1)
    above = biased >= top.values[:, k - 1 : k]  # among the k highest: without it the next moves up
    return torch.where(above, top.values[:, k : k + 1], top.values[:, k - 1 : k])
