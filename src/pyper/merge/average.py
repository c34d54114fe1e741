"""The mean of the weights of several models."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyper.merge.compatible import check_mergeable
from pyper.mixture import build_expert
from pyper.nn import Transformer


def average_weights(experts: Sequence[Transformer]) -> Transformer:
    """One dense model of the mean weights, in evaluation mode.

    Worth something where the experts have a common seed and did not go far from it: measure with
    `barrier`. Raises as `check_mergeable` does.
    """
    config = check_mergeable(experts)
    names = [name for name, _ in experts[0].named_parameters()]
    return build_expert(config, average_tensors(experts, names), device=experts[0].device)


@torch.no_grad()
def average_tensors(experts: Sequence[Transformer], names: Sequence[str]) -> dict[str, Tensor]:
    """The mean of each named parameter: taken in float32, in the dtype of the first expert.

    Running sums, so that one copy of one tensor is all it needs.
    """
    parameters = [dict(expert.named_parameters()) for expert in experts]
    return {name: _mean([own[name] for own in parameters]) for name in names}


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0]
    total = first.to(torch.promote_types(first.dtype, torch.float32), copy=True)
    for tensor in tensors[1:]:
        total += tensor.to(total)
    return (total / len(tensors)).to(first.dtype)
