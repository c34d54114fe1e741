"""Which expert trains on which sequence: three rules with one signature.

Scores are S[n, e], the log-likelihood in nats of sequence n (or of its prefix) under expert e.
All rules are deterministic, pure, and return their statistics.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyper.errors import ConfigError, NonFiniteError
from pyper.routing.prices import balanced_at, load_shares, search_prices
from pyper.routing.repair import repair_counts


@dataclass(frozen=True)
class Assignment:
    """Experts of N sequences, and how that came about."""

    expert: Tensor
    """(N,) int64."""
    prices: Tensor
    """(E,) float64, nats per unit of weight; zeros where the rule has none."""
    load: Tensor
    """(E,) float64, share of the total weight."""
    n_iterations: int = 0
    unassigned: float = 0.0
    """Share of the sequences that no expert picked before they were swept up."""


def assign_with_prices(
    scores: Tensor,
    *,
    weights: Tensor | None = None,
    capacity: Tensor | None = None,
    max_iterations: int = 400,
    tolerance: float = 1e-3,
    prices: Tensor | None = None,
) -> Assignment:
    """The balanced assignment of largest total score, by one price per expert.

    Args:
        scores: (N, E) in nats; a constant added to a row changes nothing.
        weights: (N,) > 0, e.g. token counts. Loads are then measured in tokens, `scores` are totals
            over those tokens, and prices are per token: argmax S − w·b. Without weights every
            expert ends with exactly ⌊N·C⌋ or ⌈N·C⌉ sequences and the total is the optimum.
        capacity: (E,) target shares of the load, equal by default; scaled to sum to 1.
        max_iterations: of the price search; the repair balances what is left.
        tolerance: relative error of a load at which the search ends.
        prices: (E,) to start from, e.g. those of the round before.

    Raises NonFiniteError for NaN or infinite scores, ConfigError for shapes that do not fit.
    """
    shares = _check(scores, weights, capacity)
    start = torch.zeros_like(shares) if prices is None else prices.to(shares)
    if len(scores) == 0 or scores.shape[1] == 1:
        return _assignment(torch.zeros_like(scores[:, 0], dtype=torch.int64), start, weights)
    found = search_prices(
        scores, weights, shares, max_iterations=max_iterations, tolerance=tolerance, start=start
    )
    expert, load = balanced_at(scores, found.prices, weights, shares)
    if weights is not None:
        expert = _spill(scores, expert, found.prices, weights, shares * weights.double().sum())
        return _assignment(expert, found.prices, weights, found.n_iterations)
    target = _whole_counts(shares, len(scores), load)
    expert, final = repair_counts(scores, expert, found.prices, target)
    return _assignment(expert, final - final.mean(), None, found.n_iterations)


def assign_greedy(
    scores: Tensor, *, weights: Tensor | None = None, capacity: Tensor | None = None
) -> Assignment:
    """SMALLTALK's rule (arXiv:2410.03529, section 3.2): easiest sequence first, best free expert.

    Sequences are sorted by their best log-likelihood, so the hard ones get what is left: it loses
    to prices as soon as difficulty varies more than experts differ. Arguments as above.
    """
    shares = _check(scores, weights, capacity)
    order = scores.max(dim=1).values.argsort(descending=True, stable=True)
    expert = _fill(scores, order, _room(shares, len(scores), weights), weights)
    return _assignment(expert, torch.zeros_like(shares), weights)


def assign_expert_choice(
    scores: Tensor, *, weights: Tensor | None = None, capacity: Tensor | None = None
) -> Assignment:
    """Every expert picks its C sequences of highest softmax_E(S) (arXiv:2202.09368, eq. 1).

    The softmax over experts removes each sequence's difficulty; on raw scores all experts pick the
    same easy ones. A sequence picked twice goes to the higher probability; one that nobody picked
    to the best expert with room. `unassigned` is the share of the latter. Arguments as above.
    """
    shares = _check(scores, weights, capacity)
    room = _room(shares, len(scores), weights)
    log_probs = scores.double().log_softmax(dim=1)
    picked = _picks(log_probs, room, weights)
    chosen = torch.where(picked, log_probs, -torch.inf)
    expert = torch.where(picked.any(dim=1), chosen.argmax(dim=1), -1)
    left_over = torch.nonzero(expert < 0).squeeze(1)
    size = _sizes(len(scores), weights, scores.device)
    held = torch.bincount(expert.clamp_min(0), size * (expert >= 0), minlength=len(shares))
    order = left_over[log_probs[left_over].max(dim=1).values.argsort(descending=True, stable=True)]
    expert[order] = _fill(scores, order, room - held, weights)[order]
    unassigned = len(left_over) / max(1, len(scores))
    return _assignment(expert, torch.zeros_like(shares), weights, unassigned=unassigned)


def _check(scores: Tensor, weights: Tensor | None, capacity: Tensor | None) -> Tensor:
    """Target shares (E,) float64, after the arguments proved usable."""
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise ConfigError(f"scores must be (N, E) with E ≥ 1, not {tuple(scores.shape)}")
    n, n_experts = scores.shape
    if capacity is None:
        capacity = torch.ones(n_experts)
    if capacity.shape != (n_experts,) or not bool((capacity > 0).all()):
        raise ConfigError(
            f"`capacity` must hold {n_experts} positive shares, not {capacity.tolist()}",
            hint="leave it out for equal loads",
        )
    if weights is not None and (weights.shape != (n,) or not bool((weights > 0).all())):
        raise ConfigError(f"`weights` must be {n} positive numbers, one per sequence")
    # min and max read every score without making a tensor of flags as large as the scores
    if n and not torch.stack(scores.aminmax()).isfinite().all():
        raise NonFiniteError(
            "the scores that route sequences contain NaN or infinite values",
            hint="an expert's loss diverged, or its probabilities underflow: give it a floor",
        )
    shares = capacity.double().to(scores.device)
    return shares / shares.sum()


def _assignment(
    expert: Tensor,
    prices: Tensor,
    weights: Tensor | None,
    n_iterations: int = 0,
    unassigned: float = 0.0,
) -> Assignment:
    load = load_shares(expert, len(prices), weights)
    return Assignment(expert, prices.double(), load, n_iterations, unassigned)


def _whole_counts(shares: Tensor, n: int, load: Tensor) -> Tensor:
    """Whole numbers (E,) that sum to n; the odd ones go where the demand is."""
    exact = shares * n
    counts = (exact + 1e-9).floor().long()
    demand = torch.where(exact - counts > 1e-9, load * n - exact, -torch.inf)
    counts[demand.argsort(descending=True, stable=True)[: n - int(counts.sum())]] += 1
    return counts


def _spill(
    scores: Tensor, expert: Tensor, prices: Tensor, weights: Tensor, target: Tensor
) -> Tensor:
    """Move sequences out of overfull experts, smallest loss per unit of weight first.

    Weights are lumps, so loads end within one sequence of the target, not on it.
    """
    expert = expert.clone()
    held = torch.bincount(expert, weights.double(), minlength=len(prices))
    excess = (held - target).tolist()
    for e in [e for e, over in enumerate(excess) if over > 0]:
        for n, to, size in _cheapest_moves(scores, expert, prices, weights, e, excess):
            if size <= min(excess[e], -excess[to]):
                expert[n] = to
                excess[e] -= size
                excess[to] += size
            if excess[e] <= 0:
                break
    return expert


def _cheapest_moves(
    scores: Tensor, expert: Tensor, prices: Tensor, weights: Tensor, e: int, excess: list[float]
) -> Iterator[tuple[int, int, float]]:
    """Sequences of expert e, where each would go and its weight; smallest loss first."""
    members = torch.nonzero(expert == e).squeeze(1)
    own, size = scores[members].double(), weights[members].double()
    loss = (own[:, e : e + 1] - own) / size.unsqueeze(1) - prices[e] + prices
    loss[:, [over >= 0 for over in excess]] = torch.inf
    best = loss.min(dim=1)
    order = best.values.argsort(stable=True)
    order = order[best.values[order].isfinite()]
    return zip(
        members[order].tolist(), best.indices[order].tolist(), size[order].tolist(), strict=True
    )


def _sizes(n: int, weights: Tensor | None, device: torch.device) -> Tensor:
    if weights is None:
        return torch.ones(n, dtype=torch.float64, device=device)
    return weights.double()


def _room(shares: Tensor, n: int, weights: Tensor | None) -> Tensor:
    """What each expert may hold (E,): whole sequences, or a share of the weight."""
    if weights is None:
        return _whole_counts(shares, n, shares).double()
    return shares * weights.double().sum()


def _picks(log_probs: Tensor, room: Tensor, weights: Tensor | None) -> Tensor:
    """(N, E) bool: the best sequences of each expert, as many as it has room for."""
    size = _sizes(len(log_probs), weights, log_probs.device)
    order = log_probs.argsort(dim=0, descending=True, stable=True)
    fits = size[order].cumsum(dim=0) <= room + 1e-9
    return torch.zeros_like(fits).scatter(0, order, fits)


def _fill(scores: Tensor, order: Tensor, room: Tensor, weights: Tensor | None) -> Tensor:
    """Give each sequence of `order` its best expert with room; else the emptiest takes it."""
    size = _sizes(len(scores), weights, scores.device).tolist()
    preference = scores.argsort(dim=1, descending=True, stable=True).tolist()
    left = room.tolist()
    expert = torch.full((len(scores),), -1, dtype=torch.int64)
    for n in order.tolist():
        fitting = [e for e in preference[n] if left[e] >= size[n] - 1e-9]
        e = fitting[0] if fitting else max(range(len(left)), key=left.__getitem__)
        left[e] -= size[n]
        expert[n] = e
    return expert.to(scores.device)
