"""Whether experts lie in one valley, so that their weights may be averaged."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from pyper.errors import CheckpointError, ConfigError
from pyper.merge.average import average_weights
from pyper.merge.compatible import check_mergeable
from pyper.nn import Transformer

Loss = Callable[[Transformer], float]
"""Nats per token of a model, on the same text every time; best on text of all domains."""


def barriers(experts: Sequence[Transformer], loss: Loss) -> list[float]:
    """For each expert and the next, the loss of their average minus the mean of their losses.

    Neighbours suffice: an expert of other origin stands out beside either of its own. Near 0, or
    below, for experts that branched from one seed; nats where they did not (Frankle et al.,
    arXiv:1912.05671, section 2). Raises ConfigError for fewer than two experts.
    """
    check_mergeable(experts)
    if len(experts) < 2:
        raise ConfigError("a barrier lies between two experts", hint="pass two at least")
    losses = [loss(expert) for expert in experts]
    return [
        loss(average_weights(two)) - (losses[i] + losses[i + 1]) / 2
        for i, two in enumerate(pairwise(experts))
    ]


def barrier(experts: Sequence[Transformer], loss: Loss) -> float:
    """The highest of `barriers`, in nats per token."""
    return max(barriers(experts, loss), key=_with_nan_last)


def check_common_seed(experts: Sequence[Transformer], loss: Loss, limit: float) -> float:
    """The barrier. Raises CheckpointError where it exceeds `limit` nats per token."""
    found = barriers(experts, loss)
    worst = max(range(len(found)), key=lambda i: _with_nan_last(found[i]))
    if not found[worst] <= limit:  # NaN too
        raise CheckpointError(
            f"experts {worst} and {worst + 1} have no common seed: halfway between them the loss "
            f"is {found[worst]:.3f} nats per token above the mean of theirs, more than {limit:g}",
            hint="branch all experts from one seed (`train.seed_fraction` above 0), or keep these "
            "as a mixture of whole models, which needs no common seed",
        )
    return found[worst]


@torch.no_grad()
def likeness(model: Transformer, expert: Transformer) -> float:
    """Cosine between the feed-forwards of a dense expert and the mean ones of a sparse model.

    It needs no text. Measured: 0.98 and more for branches of one seed, 0.00 for strangers, 0.16
    where strangers began from one draw of first weights. NaN for weights of 0.
    """
    own = dict(expert.named_parameters())
    products = torch.zeros(3, dtype=torch.float64)
    for name, stacked in model.named_parameters():
        if ".feed_forward." in name and name in own and stacked.ndim == own[name].ndim + 1 == 3:
            there, new = stacked.float().mean(dim=0).flatten(), own[name].float().flatten()
            products += torch.stack((there @ new, there @ there, new @ new)).double().cpu()
    between, there_alone, new_alone = products.tolist()
    return between / norm if (norm := math.sqrt(there_alone * new_alone)) else math.nan


def check_kinship(model: Transformer, expert: Transformer, limit: float) -> float:
    """The likeness. Raises CheckpointError where it is below `limit`."""
    found = likeness(model, expert)
    if not found >= limit:  # NaN too
        raise CheckpointError(
            "the new expert has no common seed with those of the model: the cosine of its "
            f"feed-forwards with theirs is {found:.3f}, less than {limit:g}; branches of one seed "
            "have 0.9",
            hint="add an expert that branched from the same seed, or keep whole models beside each "
            "other: `pyper mix RUN --add`",
        )
    return found


def _with_nan_last(value: float) -> float:
    return value if value == value else float("inf")
