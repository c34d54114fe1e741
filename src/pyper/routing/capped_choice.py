"""Expert choice with at most b experts per token, as an entropy-regularised linear programme.

max ⟨S, A⟩ + λH(A) over 0 ≤ A ≤ 1, Σ_n A[n, e] = C, Σ_e A[n, e] ≤ b (arXiv:2202.09368, eq. 3). Its
optimum is A = min(1, exp((S − price of the expert − price of the token) / λ)), so two vectors of
prices are all there is to find, one given the other in turn: the dual, ascended block by block.

Plain Dykstra projections onto the columns, the rows and A ≤ 1 reach the same A, but where C − 1
tokens already stand at 1 a round raises the others by a factor of C / (C − 1) only: after 100
rounds of 8192 tokens at λ = 0.001 the experts had a tenth of their tokens. So a step here projects
onto its sum and onto A ≤ 1 together, exactly.
"""

import torch
from torch import Tensor

from pyper.errors import ConfigError
from pyper.routing.expert_choice import TokenChoice

_ENTROPY_WEIGHT = 1e-3
_ITERATIONS = 100
_TOLERANCE = 1e-3
"""Experts per token over b at which the iteration ends."""
_COOLING = 0.7
"""λ starts at the range of the scores: a step moves prices by a few λ only."""
# Whether it has converged is asked on a CPU only: a GPU would be waited for, at every turn. Scores
# of 16 k tokens took 21 iterations and 3 rounds.
_GPU_ITERATIONS, _GPU_ROUNDS = 32, 6


def capped_assignment(
    scores: Tensor,
    capacity: int,
    max_experts: int,
    *,
    entropy_weight: float = _ENTROPY_WEIGHT,
    iterations: int = _ITERATIONS,
) -> Tensor:
    """A (N, E) of scores (N, E), float32; C is `capacity`, b `max_experts`, λ `entropy_weight`.

    A score of −∞ forbids the pair. Columns sum to C but for rounding (λ below 1e-4 of the largest
    score is too small for float32); rows to at most b + 1e-3 unless the iterations ran out. They
    suffice where there are thousands of tokens and room (C · E well below b · N); with no room a
    few rows are some hundredths over, and of few tokens one may be over by a half.

    Raises ConfigError where C · E > b · N: no assignment keeps the cap.
    """
    log_a = _log_assignment(scores, capacity, max_experts, entropy_weight, iterations)
    return log_a.clamp(max=0).exp()


def _log_assignment(
    scores: Tensor, capacity: int, max_experts: int, entropy_weight: float, iterations: int
) -> Tensor:
    """(N, E), (S − prices) / λ: log A where that is below 0, and an order among the pairs at 1."""
    n_tokens, n_experts = scores.shape
    max_experts = min(max_experts, n_experts)
    if capacity * n_experts > max_experts * n_tokens:
        raise ConfigError(
            f"{n_experts} experts cannot take {capacity} of {n_tokens} tokens each where a token "
            f"meets at most {max_experts}",
            hint="let a token meet more experts, or lower `capacity_factor`",
        )
    by_expert, weight = scores.T, _range(scores)
    token_price = torch.zeros_like(by_expert[:1])
    may_ask = not scores.is_cuda
    for _ in range(iterations if may_ask else min(iterations, _GPU_ITERATIONS)):
        weight = (weight * _COOLING).clamp(min=entropy_weight)
        offers = by_expert / weight
        offers = offers + _shift_to_sum(offers - token_price / weight, capacity)
        row_sum = (offers - token_price / weight).clamp(max=0).exp().sum(dim=0)
        fits = (row_sum <= max_experts + _TOLERANCE).all() & (weight <= entropy_weight)
        if may_ask and bool(fits):
            break
        token_price = -weight * _shift_to_sum(offers.T, max_experts).T.clamp(max=0)
    log_a = (by_expert - token_price) / entropy_weight
    return (log_a + _shift_to_sum(log_a, capacity)).T


def _range(scores: Tensor) -> Tensor:
    """(), of those that are allowed."""
    allowed = scores.isfinite()
    highest = scores.masked_fill(~allowed, -torch.inf).amax()
    return highest - scores.masked_fill(~allowed, torch.inf).amin()


def _shift_to_sum(log_a: Tensor, total: int) -> Tensor:
    """(…, 1): the t for which Σ min(1, exp(log_a + t)) over the last dimension is `total`.

    With the m largest at 1, the others must sum to total − m; m is the least that leaves none of
    them above 1.
    """
    ordered = log_a.sort(dim=-1, descending=True).values
    rest = ordered.flip(-1).logcumsumexp(dim=-1).flip(-1)[..., :total]
    missing = total - torch.arange(total, device=log_a.device, dtype=log_a.dtype)
    shift = missing.log() - rest
    fits = ordered[..., :total] + shift <= 0
    return shift.gather(-1, fits.int().argmax(dim=-1, keepdim=True))


def choose_tokens_capped(
    scores: Tensor, capacity: int, max_experts: int, padding: Tensor | None = None
) -> TokenChoice:
    """The regularised assignment of scores (N, E), rounded to `capacity` tokens for each expert.

    padding: (N,), True where there is no token; the others must be at least C · E / b. A token has
    more than b experts only where no other is left for an expert to take: never seen with a tenth
    of the places to spare; with none, up to 5 % of the tokens where softmax saturates. `kth_score`
    is the lowest *score* among the tokens taken; as a threshold it lets through what the cap kept
    out.
    """
    scores = scores.detach()
    if padding is not None:
        scores = scores.masked_fill(padding[:, None], -torch.inf)
    log_a = _log_assignment(scores, capacity, max_experts, _ENTROPY_WEIGHT, _ITERATIONS)
    taken = _round_under_cap(log_a, capacity, max_experts)
    token_index = taken.T.float().topk(capacity, dim=-1).indices
    return TokenChoice(token_index, scores.T.gather(1, token_index).amin(dim=1))


def _round_under_cap(log_a: Tensor, capacity: int, max_experts: int) -> Tensor:
    """(N, E) bool, C in each column, as log_a (N, E) prefers.

    Where A is fractional, the experts' C highest alone would meet in the same tokens; in all of
    them where scores are equal. So experts propose, tokens with room accept the best, and what an
    expert still misses it proposes in the next round.
    """
    taken = torch.zeros_like(log_a, dtype=torch.bool)
    may_ask, rounds = not log_a.is_cuda, 2 * log_a.shape[1]
    for _ in range(rounds if may_ask else min(rounds, _GPU_ROUNDS)):
        room = max_experts - taken.sum(dim=1, keepdim=True)
        offers = log_a.masked_fill(taken | (room <= 0), -torch.inf)
        proposed = (_rank(offers, dim=0) < capacity - taken.sum(dim=0)) & offers.isfinite()
        if may_ask and not bool(proposed.any()):
            break
        taken |= proposed & (_rank(offers.masked_fill(~proposed, -torch.inf), dim=1) < room)
    rest = log_a.masked_fill(taken, -torch.inf)
    return taken | (_rank(rest, dim=0) < capacity - taken.sum(dim=0))


def _rank(values: Tensor, dim: int) -> Tensor:
    """0 for the highest along `dim`; the lower index first among equals."""
    order = values.argsort(dim=dim, descending=True, stable=True)
    shape = [-1 if d == dim else 1 for d in range(values.ndim)]
    place = torch.arange(values.shape[dim], device=values.device).view(shape).expand_as(order)
    return torch.empty_like(order).scatter_(dim, order, place)
