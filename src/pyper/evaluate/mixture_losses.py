"""Held-out losses of a mixture in every mixing mode, from the experts' scores of the same windows.

Each expert reads the text once. All modes follow from its log-probabilities of the observed
tokens, by the rules of `pyper.mixture.mixing`: a mode is causal here exactly when it is there.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyper.errors import DataError
from pyper.evaluate.losses import HeldOut, token_losses
from pyper.mixture import Mixture
from pyper.mixture.mixing import one_expert, posterior_rule, prefix_rule
from pyper.nn import Transformer
from pyper.routing import mix_log_probs, posterior_log_weights, route_prefix


@dataclass(frozen=True)
class Scores:
    """What the experts and the router say of one domain's windows."""

    domain: str
    experts: Tensor
    """(N, T, E), log-probabilities of the observed tokens."""
    router: Tensor
    """(N, T, E), the same by the router."""
    control: Tensor | None
    """(N, T), nats of the dense control."""
    random_shards: Tensor | None
    """(N, T, E), experts trained on random shards."""
    bytes_per_token: float
    weights: Tensor | None = None
    """(N, T), 1 for the predictions that count, else 0; None where all do."""

    @property
    def n_tokens(self) -> int:
        """Predictions that count."""
        if self.weights is not None:
            return int(self.weights.sum())
        return self.experts.shape[0] * self.experts.shape[1]


def score_held_out(
    mixture: Mixture,
    held_out: Sequence[HeldOut],
    *,
    control: Transformer | None = None,
    random_shards: Iterable[Transformer] = (),
) -> list[Scores]:
    """Let every expert (one in memory at a time suffices) and the control read all windows.

    Raises DataError where there are none.
    """
    if not held_out:
        raise DataError(
            "no held-out text is as long as one window",
            hint="prepare with larger held-out fractions, or lower `data.seq_len`",
        )
    experts = [
        [-token_losses(mixture.expert(e), h.tokens) for h in held_out]
        for e in range(mixture.n_experts)
    ]
    shards = [[-token_losses(model, h.tokens) for h in held_out] for model in random_shards]
    scores = []
    for i, h in enumerate(held_out):
        own = torch.stack([e[i] for e in experts], dim=-1)
        read = own if mixture.router is None else _router_scores(mixture, h)
        scores.append(
            Scores(
                h.domain,
                own,
                read,
                None if control is None else token_losses(control, h.tokens),
                torch.stack([s[i] for s in shards], dim=-1) if shards else None,
                h.bytes_per_token,
                h.weights,
            )
        )
    return scores


def _router_scores(mixture: Mixture, held_out: HeldOut) -> Tensor:
    assert mixture.router is not None
    parts = [mixture.router.token_scores(part) for part in held_out.tokens.split(256)]
    return torch.cat(parts).cpu()


@dataclass(frozen=True)
class Rows:
    """Per-token losses (N, T) of every arm of one domain; 0 where a prediction does not count."""

    control: Tensor | None
    experts: Tensor
    """(N, T, E)."""
    oracle: Tensor
    routed: dict[int, Tensor]
    routed_with_prices: Tensor | None
    posterior: dict[str, Tensor]
    random_shards: Tensor | None
    chosen: Tensor
    """(N,), experts of the middle prefix."""
    entropy: Tensor
    """(N, T), of the posterior, nats."""
    weights: Tensor
    """(N, T), 1 for the predictions that count, else 0."""


def losses_of_modes(
    scores: Scores,
    *,
    temperature: float,
    prefixes: Sequence[int],
    prices: Tensor | None = None,
) -> Rows:
    """Every arm on one domain. Windows shorter than a prefix are all cold start."""
    own, read = scores.experts, scores.router
    n_experts = own.shape[-1]
    middle = prefixes[len(prefixes) // 2]
    posterior = posterior_log_weights(own, temperature=temperature)
    counts = torch.ones(own.shape[:2]) if scores.weights is None else scores.weights
    # All tokens are read, and routed by; only those that count are scored.

    def mixed(log_weights: Tensor) -> Tensor:
        return -mix_log_probs(log_weights, own) * counts

    def routed(n: int, price: Tensor | None = None) -> Tensor:
        return mixed(
            prefix_rule(
                own, router_scores=read, prefix_tokens=n, temperature=temperature, prices=price
            )
        )

    best = (own * counts[..., None]).sum(dim=1).argmax(dim=-1)
    top = {"top1": 1, "top2": min(2, n_experts), "all": n_experts}
    return Rows(
        control=None if scores.control is None else scores.control * counts,
        experts=-own * counts[..., None],
        oracle=mixed(one_expert(best[:, None].expand(own.shape[:2]), own)),
        routed={n: routed(n) for n in prefixes},
        routed_with_prices=None if prices is None else routed(middle, prices),
        posterior={
            name: mixed(posterior_rule(own, temperature=temperature, top_k=k))
            for name, k in top.items()
        },
        random_shards=_uniform(scores.random_shards, counts),
        chosen=route_prefix(read, middle),
        entropy=-(posterior.exp() * posterior).nan_to_num().sum(dim=-1) * counts,
        weights=counts,
    )


def _uniform(log_probs: Tensor | None, counts: Tensor) -> Tensor | None:
    """Loss of the ensemble of equal weights."""
    if log_probs is None:
        return None
    return -mix_log_probs(torch.zeros_like(log_probs).log_softmax(-1), log_probs) * counts


def fit_temperature(scores: Sequence[Scores], top_k: int) -> float:
    """τ of the posterior with the smallest loss (on validation), from a grid."""
    grid = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
    return min(grid, key=lambda tau: _posterior_loss(scores, tau, top_k))


def _posterior_loss(scores: Sequence[Scores], temperature: float, top_k: int) -> float:
    total = 0.0
    for s in scores:
        rule = posterior_rule(s.experts, temperature=temperature, top_k=top_k)
        losses = -mix_log_probs(rule, s.experts).double()
        total += float((losses if s.weights is None else losses * s.weights).sum())
    return total / sum(s.n_tokens for s in scores)
