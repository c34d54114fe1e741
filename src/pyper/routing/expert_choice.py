"""Expert choice inside a layer: each expert takes the tokens it scores highest.

N tokens of a pool, E experts, C = ⌊capacity_factor · N / E⌋. Expert choice is not causal: whether a
token is taken depends on all others of the pool. So it is for training only; what it learns is
carried over to evaluation and decoding by thresholds (see `thresholds`).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyper.errors import DataError

Gate = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class TokenChoice:
    """The tokens that each expert reads."""

    token_index: Tensor
    """(E, C) int64, into the pool; an expert's tokens are distinct."""
    kth_score: Tensor
    """(E,), the lowest score taken, without gradient: `scores >= kth_score` gives the choice."""


def router_probs(router_logits: Tensor, gate: Gate) -> Tensor:
    """Gates (N, E) of router logits (N, E): over the experts of one token, never over tokens.

    `softmax` is S of arXiv:2202.09368, eq. 1; `sigmoid` judges each expert on its own.
    """
    return router_logits.softmax(dim=-1) if gate == "softmax" else router_logits.sigmoid()


def capacity_of(n_tokens: int, n_experts: int, capacity_factor: float) -> int:
    """C = ⌊capacity_factor · n_tokens / n_experts⌋. Raises DataError where that is 0."""
    capacity = int(capacity_factor * n_tokens / n_experts + 1e-6)  # 0.29 · 100 is 28.999…
    if capacity < 1:
        raise DataError(
            f"a pool of {n_tokens} tokens gives none of {n_experts} experts a token at "
            f"`capacity_factor` {capacity_factor:g}",
            hint="raise `train.micro_batch_size` or `data.seq_len`, or lower `n_experts`",
        )
    return min(capacity, n_tokens)


def choose_tokens(scores: Tensor, capacity: int, padding: Tensor | None = None) -> TokenChoice:
    """Each expert's `capacity` highest of scores (N, E), float32 (arXiv:2202.09368, eq. 1).

    padding: (N,), True where there is no token; those are never taken as long as the capacity does
    not exceed the number of others, so derive it from that number.
    """
    scores = scores.detach()
    if padding is not None:
        scores = scores.masked_fill(padding[:, None], -torch.inf)
    top = scores.T.topk(capacity, dim=-1, sorted=True)
    return TokenChoice(top.indices, top.values[:, -1])


def as_mask(token_index: Tensor, n_tokens: int) -> Tensor:
    """(N, E) bool: which token is read by which expert, of token_index (E, C)."""
    chosen = torch.zeros(
        token_index.shape[0], n_tokens, dtype=torch.bool, device=token_index.device
    )
    return chosen.scatter_(1, token_index, True).T
