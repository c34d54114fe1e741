"""One more expert in a model that is already merged."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyper.config import SparseConfig
from pyper.merge.compatible import check_fits
from pyper.merge.routers import ridge_regression
from pyper.merge.sparse_model import sparse_config_of
from pyper.merge.thresholds import compared_scores
from pyper.merge.walk import (
    Routed,
    check_one_sample_per_expert,
    expert_of_token,
    visit_routers,
)
from pyper.mixture import build_expert
from pyper.mixture.expert_folder import model_tensors
from pyper.nn import Transformer
from pyper.nn.sparse_feed_forward import SparseFeedForward
from pyper.routing import capacity_of, choose_tokens
from pyper.routing.precision import widen

_FEED_FORWARD = ".feed_forward."


@torch.no_grad()
def add_expert(
    model: Transformer,
    dense_expert: Transformer,
    *,
    samples: Sequence[Tensor] | None = None,
    ridge: float = 0.01,
) -> Transformer:
    """A copy of a sparse model in which the feed-forwards of `dense_expert` are the last experts.

    What was there stays bit for bit: attention, norms and embeddings of the new expert are left
    out. Without samples its router row is the mean of the rows (it never is a token's first
    choice: train it, or give samples), its threshold and bias the means of the others'. With
    samples, one (n, T) of each expert's domain with the new one's last, ridge regression gives the
    row, on the scale of the rows that are there, and their pool the threshold.

    Where nothing is routed to the new expert, logits stay the same with sigmoid gates, and with
    normalised gates as long as there are no balancing biases. Otherwise softmax gates become
    smaller by what the new expert gets of them.

    Raises ConfigError where `model` is not sparse or `dense_expert` not dense, TokenizerError or
    CheckpointError where they do not fit together, DataError for samples that do not fit.
    """
    check_fits(dense_expert, model)
    sparse = model.config.routing
    if samples is not None:
        check_one_sample_per_expert(samples, sparse.n_experts + 1)
    larger = SparseConfig.model_validate(sparse.model_dump() | {"n_experts": sparse.n_experts + 1})
    own = dict(dense_expert.named_parameters())
    tensors = {name: _extended(name, old, own) for name, old in model_tensors(model).items()}
    config = sparse_config_of(model.config, larger)
    extended = build_expert(config, tensors, device=model.device)
    if samples is not None:
        _fit_last(extended, samples, ridge)
    return extended


def _extended(name: str, old: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    """A tensor of the model with the new expert's part behind it, where it has a part."""
    _, is_sparse, part = name.rpartition(_FEED_FORWARD)
    if not is_sparse or part.startswith("shared.") or part == "state.threshold_updates":
        return old
    if name in own and own[name].shape == old.shape:  # a dense layer between sparse ones
        return old
    new = own[name].to(old) if name in own else old.mean(dim=0)
    return torch.cat((old, new.unsqueeze(0)))


def _fit_last(model: Transformer, samples: Sequence[Tensor], ridge: float) -> None:
    """Router row and threshold of the last expert of each sparse layer, front to back."""
    is_new = expert_of_token(samples) == len(samples) - 1

    def visit(_: str, layer: Routed, x: Tensor) -> None:
        if isinstance(layer, SparseFeedForward):
            _fit_last_row(layer, x, is_new.to(x.device), ridge)
            _calibrate_last(layer, x)

    visit_routers(model, samples, visit)


def _fit_last_row(layer: SparseFeedForward, x: Tensor, is_new: Tensor, ridge: float) -> None:
    """Ahead of the best other expert at home, and behind it elsewhere, by their usual distance.

    One-hot targets, as for all rows together, would not do: the rows that stay never saw the new
    domain, and some are as high there as at home.
    """
    rows = layer.router.weight
    best_two = F.linear(widen(x), widen(rows[:-1])).topk(2, dim=-1).values  # (N, 2)
    ahead = (best_two[:, 0] - best_two[:, 1]).mean()
    target = best_two[:, 0] + torch.where(is_new, ahead, -ahead)
    rows[-1] = ridge_regression(x, target.unsqueeze(1), ridge).squeeze(1).to(rows)


def _calibrate_last(layer: SparseFeedForward, x: Tensor) -> None:
    """The last threshold at the k-th score; it counts for as many steps as the others."""
    sparse, state = layer.sparse, layer.state
    if not sparse.is_expert_choice or not state.threshold_updates:
        return
    capacity = capacity_of(len(x), sparse.n_experts, sparse.capacity_factor)
    kth_score = choose_tokens(compared_scores(layer, x), capacity).kth_score[-1]
    weight = 1 - sparse.threshold_decay ** int(state.threshold_updates)
    state.threshold_total[-1] = kth_score * weight
