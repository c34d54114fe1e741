"""One price per expert: the dual of the balanced assignment.

Maximising Σ_n S[n, a(n)] with every expert at its target load has the dual
g(b) = Σ_n max_e (S[n, e] − w_n b_e) + Σ_e b_e C_e, convex in E prices, whose subgradient is
C − load(b). The search is b_e += η_e (load_e − C_e) / C_e with a step per expert that grows while
its error keeps its sign and shrinks when it flips (RProp; Riedmiller & Braun 1993): loads respond
to prices at very different rates, and a common step either crawls or rings.

Scores are read in chunks and never copied whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 20
_SAMPLE = 1 << 16  # sequences that find the prices roughly before all of them are read
# Equal scores (duplicates, experts that are still copies of each other) would move from expert to
# expert all at once; noise this small against the spread of the scores lets them split.
_DITHER = 1e-5
_MANY_MOVES = 10_000


@dataclass(frozen=True)
class Search:
    """What a price search found: prices (E,) float64, their worst relative error of load."""

    prices: Tensor
    error: float
    n_iterations: int


def apply_prices(scores: Tensor, prices: Tensor, weights: Tensor | None = None) -> Tensor:
    """The expert (N,) int64 of each sequence: argmax (S − w·b), causal for one new sequence.

    `scores` (N, E) in nats, `prices` (E,) in nats per unit of weight, `weights` (N,).
    """
    return loads_at(scores, prices, weights)[0]


def search_prices(
    scores: Tensor,
    weights: Tensor | None,
    capacity: Tensor,
    *,
    max_iterations: int,
    tolerance: float,
    start: Tensor | None = None,
) -> Search:
    """Prices whose loads are within `tolerance` (relative) of `capacity` (E,), shares of 1.

    A sample of the sequences goes first; the whole set corrects its sampling error.
    """
    scale = typical_spread(scores, weights)
    prices = torch.zeros_like(capacity) if start is None else start.to(capacity)
    spent, step = 0, 0.3 * scale
    if len(scores) > 2 * _SAMPLE:
        rows = _sample_rows(scores)
        few = None if weights is None else weights[rows]
        # looser: the sample itself knows a load only to about √(E / 65536)
        rough = _descend(
            scores[rows], few, capacity, prices, step, scale, max_iterations, 2 * tolerance
        )
        prices, spent, step = rough.prices, rough.n_iterations, 0.02 * scale
    left = max(1, max_iterations - spent)
    found = _descend(scores, weights, capacity, prices, step, scale, left, tolerance)
    return Search(found.prices, found.error, spent + found.n_iterations)


def typical_spread(scores: Tensor, weights: Tensor | None) -> float:
    """Standard deviation over the experts of one sequence's scores, in nats per unit of weight.

    Unchanged by a constant added to all scores of a sequence, so steps made of it are too.
    """
    rows = scores[:: max(1, len(scores) // _SAMPLE)].double()
    if weights is not None:
        w = weights[:: max(1, len(scores) // _SAMPLE)].double()
        rows = rows / w.clamp_min(1e-12).unsqueeze(1)
    spread = (rows - rows.mean(dim=1, keepdim=True)).square().mean().sqrt().item()
    return spread or 1.0


def loads_at(
    scores: Tensor, prices: Tensor, weights: Tensor | None, dither: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Experts (N,) and their shares of the total weight (E,) float64 under `prices`."""
    expert = torch.empty(len(scores), dtype=torch.int64, device=scores.device)
    for start, values in _chunks(scores, prices, weights, dither):
        expert[start : start + len(values)] = values.argmax(dim=1)
    return expert, load_shares(expert, scores.shape[1], weights)


def balanced_at(
    scores: Tensor, prices: Tensor, weights: Tensor | None, capacity: Tensor
) -> tuple[Tensor, Tensor]:
    """`loads_at`, with ties split by the noise of the search where there are too many of them.

    Without noise every sequence sits exactly at its best, which an exact repair needs; a repair of
    more than `_MANY_MOVES` would take minutes and settle ties only.
    """
    expert, load = loads_at(scores, prices, weights)
    if (load - capacity).clamp_min(0).sum().item() * len(scores) <= _MANY_MOVES:
        return expert, load
    return loads_at(scores, prices, weights, dither_table(scores, typical_spread(scores, weights)))


def load_shares(expert: Tensor, n_experts: int, weights: Tensor | None) -> Tensor:
    """Share of the total weight at each expert, (E,) float64."""
    total = None if weights is None else weights.double()
    load = torch.bincount(expert, weights=total, minlength=n_experts).double()
    return load / load.sum().clamp_min(1e-300)


def dither_table(scores: Tensor, scale: float) -> Tensor:
    """Noise for one chunk (n, E), used again for every chunk; the same in every call."""
    n_rows = min(len(scores), _chunk_rows(scores))
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(n_rows, scores.shape[1], generator=generator)
    return (_DITHER * scale * noise).to(scores.device, _working_dtype(scores))


def _descend(
    scores: Tensor,
    weights: Tensor | None,
    capacity: Tensor,
    prices: Tensor,
    step: float,
    scale: float,
    max_iterations: int,
    tolerance: float,
) -> Search:
    steps = torch.full_like(prices, step)
    previous = torch.zeros_like(prices)
    noise = dither_table(scores, scale)
    best = Search(prices, float("inf"), 0)
    for iteration in range(1, max_iterations + 1):
        _, load = loads_at(scores, prices, weights, noise)
        error = (load - capacity) / capacity
        if error.abs().max().item() < best.error:
            best = Search(prices, error.abs().max().item(), iteration)
        if best.error <= tolerance:
            break
        agrees = torch.sign(error * previous)
        steps *= torch.where(agrees > 0, 1.3, torch.where(agrees < 0, 0.5, 1.0))
        # an overshoot of several times the target says no more than "far too much"
        prices = prices + steps * error.clamp(-1.0, 1.0)
        prices = prices - prices.mean()  # only differences between prices mean anything
        previous = error
    return Search(best.prices, best.error, iteration)


def _chunks(
    scores: Tensor, prices: Tensor, weights: Tensor | None, dither: Tensor | None
) -> Iterator[tuple[int, Tensor]]:
    """S − S[:, :1] − w·b, chunk by chunk, in one buffer.

    The difference to the first expert comes first: log-likelihoods of −3000 nats have steps of
    2·10⁻⁴ in float32, and a price subtracted from those would be rounded to them.
    """
    n_rows = len(dither) if dither is not None else _chunk_rows(scores)
    prices = (prices - prices[0]).to(_working_dtype(scores))
    buffer = scores.new_empty((min(n_rows, len(scores)), scores.shape[1]), dtype=prices.dtype)
    for start in range(0, len(scores), n_rows):
        rows = scores[start : start + n_rows].to(prices.dtype)
        values = buffer[: len(rows)]
        torch.sub(rows, rows[:, :1], out=values)
        if weights is None:
            values -= prices
        else:
            values -= weights[start : start + n_rows].to(values).unsqueeze(1) * prices
        if dither is not None:
            values += dither[: len(rows)]
        yield start, values


def _chunk_rows(scores: Tensor) -> int:
    return max(1, _CHUNK_ELEMENTS // scores.shape[1])


def _working_dtype(scores: Tensor) -> torch.dtype:
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def _sample_rows(scores: Tensor) -> Tensor:
    """Random rows, as data often comes sorted or interleaved by domain."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(len(scores), (_SAMPLE,), generator=generator).to(scores.device)
