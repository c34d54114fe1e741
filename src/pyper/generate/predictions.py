"""What a mixture says of the next token of texts, from what their experts say."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyper.generate.reading import Text
from pyper.routing import mix_log_probs


@dataclass(frozen=True)
class Predictions:
    """Of the next token of some texts (R) with equally many (A) experts that have read them."""

    texts: list[Text]
    experts: list[list[int]]
    """(R, A)."""
    log_probs: Tensor
    """(R, V), of the mixture."""
    per_expert: Tensor
    """(R, A, V)."""


def mixed(members: Sequence[tuple[Text, list[int]]]) -> Predictions:
    """By the weights of texts, each with equally many experts that have read all of it."""
    texts, experts = [m[0] for m in members], [m[1] for m in members]
    rows = [_last(t, e) for t, es in members for e in es]
    per_expert = torch.stack(rows).view(len(members), -1, len(rows[0]))
    if per_expert.shape[1] == 1:
        return Predictions(texts, experts, per_expert[:, 0], per_expert)
    weights = torch.tensor([[t.known_weights[e] for e in es] for t, es in members])
    log_probs = mix_log_probs(weights.log().to(per_expert.device), per_expert)
    return Predictions(texts, experts, log_probs, per_expert)


def _last(text: Text, expert: int) -> Tensor:
    last = text.readings[expert].last
    assert last is not None
    return last
