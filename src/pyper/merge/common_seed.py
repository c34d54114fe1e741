"""Whether experts lie in one valley, so that their weights may be averaged."""

from collections.abc import Callable, Sequence
from itertools import pairwise

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


def _with_nan_last(value: float) -> float:
    return value if value == value else float("inf")
