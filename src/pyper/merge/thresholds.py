"""Thresholds of a model that was not trained with them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyper.merge.walk import Routed, visit_routers
from pyper.nn import Transformer
from pyper.nn.sparse_feed_forward import SparseFeedForward
from pyper.routing import capacity_of, choose_tokens, router_probs
from pyper.routing.precision import widen


def calibrate_thresholds(model: Transformer, samples: Sequence[Tensor]) -> None:
    """Set the thresholds of every sparse layer in place, front to back, from one pool of tokens.

    samples: (n, T) each; in the proportions in which text will come, and 8 k tokens at least. Each
    expert's threshold becomes the k-th of its scores, so that of this pool it reads C tokens (the
    k-th itself no longer passes: C − 1). Without it an untrained model lets everything through.
    It counts as one step of the moving average: training outweighs it within two. Layers of token
    choice have no thresholds and stay as they are. Raises DataError where the pool is too small.
    """

    def visit(_: str, layer: Routed, x: Tensor) -> None:
        calibrate_layer(layer, x)

    visit_routers(model, samples, visit)


def calibrate_layer(layer: Routed, x: Tensor) -> None:
    """The same for one layer that reads x (N, D)."""
    if not isinstance(layer, SparseFeedForward) or not layer.sparse.is_expert_choice:
        return
    sparse = layer.sparse
    capacity = capacity_of(len(x), sparse.n_experts, sparse.capacity_factor)
    clear_thresholds(layer)
    layer.state.observe_kth_score(choose_tokens(compared_scores(layer, x), capacity).kth_score)
    layer.state.end_step()


def clear_thresholds(layer: SparseFeedForward) -> None:
    """As before the first step: everything passes."""
    layer.state.threshold_total.zero_()
    layer.state.threshold_updates.zero_()


@torch.no_grad()
def compared_scores(layer: SparseFeedForward, x: Tensor) -> Tensor:
    """(N, E): what expert choice compares, of x (N, D)."""
    logits = F.linear(widen(x), widen(layer.router.weight))
    return router_probs(logits, "softmax") if layer.sparse.gate == "softmax" else logits
