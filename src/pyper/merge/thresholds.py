"""Thresholds of layers that were not trained with them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pyper.merge.walk import Routed
from pyper.nn.sparse_feed_forward import SparseFeedForward
from pyper.routing import capacity_of, choose_tokens, router_probs
from pyper.routing.precision import widen


def calibrate_layer(layer: Routed, x: Tensor) -> None:
    """`Transformer.calibrate_thresholds` for one layer, which reads x (N, D)."""
    if not isinstance(layer, SparseFeedForward) or not layer.sparse.is_expert_choice:
        return
    sparse = layer.sparse
    capacity = capacity_of(len(x), sparse.n_experts, sparse.capacity_factor)
    layer.state.set_threshold(choose_tokens(compared_scores(layer, x), capacity).kth_score)


def clear_thresholds(layer: SparseFeedForward) -> None:
    """As before the first step: everything passes."""
    layer.state.threshold_total.zero_()
    layer.state.threshold_updates.zero_()


@torch.no_grad()
def compared_scores(layer: SparseFeedForward, x: Tensor) -> Tensor:
    """(N, E): what expert choice compares, of x (N, D)."""
    logits = F.linear(widen(x), widen(layer.router.weight))
    return router_probs(logits, "softmax") if layer.sparse.gate == "softmax" else logits
