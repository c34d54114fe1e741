"""Sparse layers as one would explain them: token by token, expert by expert, in float64."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nn.small_experts import small_config
from pyper.config import SparseConfig
from pyper.nn.sparse_feed_forward import SparseFeedForward
from pyper.routing import choose_tokens_capped


def random_layer(sparse: dict[str, Any], *, seed: int = 0, **changes: Any) -> SparseFeedForward:
    """Every parameter random, in float64; thresholds that let about one of four pairs through."""
    settings = SparseConfig(**{"n_experts": 4} | sparse)
    layer = SparseFeedForward(small_config(kind="sparse", sparse=settings, **changes)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            draws = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_((0.25 if name == "router.weight" else 0.5) * draws)
    if settings.is_expert_choice:
        scores = scores_of(layer, random_input(8, 16, seed=seed + 1).flatten(0, 1))
        layer.state.observe_kth_score(scores.quantile(0.75, dim=0).float())
        layer.state.end_step()
    else:
        layer.state.balance_bias.copy_(0.1 * torch.randn(settings.n_experts, generator=generator))
    return layer


def random_input(batch: int, length: int, *, seed: int = 0, width: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, width, generator=generator, dtype=torch.float64)


def gates_of(layer: SparseFeedForward, tokens: Tensor) -> Tensor:
    """(N, E), by definition."""
    logits = tokens @ layer.router.weight.T
    if layer.sparse.gate == "sigmoid":
        return 1 / (1 + (-logits).exp())
    return logits.exp() / logits.exp().sum(dim=1, keepdim=True)


def scores_of(layer: SparseFeedForward, tokens: Tensor) -> Tensor:
    """(N, E), what experts compare: softmax gates, or the logits under sigmoid gates."""
    with torch.no_grad():
        if layer.sparse.gate == "softmax":
            return gates_of(layer, tokens)
        return tokens @ layer.router.weight.T


def chosen_by(layer: SparseFeedForward, tokens: Tensor, rule: str, n_rows: int) -> Tensor:
    """(N, E) bool."""
    sparse, scores = layer.sparse, scores_of(layer, tokens)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    if sparse.routing == "token_choice":
        wanted = gates_of(layer, tokens).detach() + layer.state.balance_bias
        for n, row in enumerate(wanted.tolist()):
            best = sorted(range(len(row)), key=lambda e: -row[e])[: sparse.top_k]
            chosen[n, best] = True
    elif rule == "threshold":
        margin = scores - layer.state.threshold
        for n, row in enumerate(margin.tolist()):
            passing = sorted((e for e in range(len(row)) if row[e] > 0), key=lambda e: -row[e])
            most = sparse.max_experts_per_token if sparse.routing == "capped" else len(row)
            chosen[n, passing[:most]] = True
    elif rule == "per_sequence":
        size = len(tokens) // n_rows
        for start in range(0, len(tokens), size):
            part = slice(start, start + size)
            chosen[part] = chosen_by(layer, tokens[part], "expert_choice", 1)
    else:
        capacity = int(sparse.capacity_factor * len(tokens) / sparse.n_experts)
        if sparse.routing == "capped":
            limit = sparse.max_experts_per_token
            index = choose_tokens_capped(scores, capacity, limit).token_index.tolist()
        else:
            columns = scores.T.tolist()
            order = range(len(tokens))
            index = [sorted(order, key=lambda n: -column[n])[:capacity] for column in columns]
        for e, members in enumerate(index):
            chosen[members, e] = True
    return chosen


def one_feed_forward(layer: SparseFeedForward, expert: int, x: Tensor) -> Tensor:
    """f_e(x) of one token (D,)."""
    hidden = layer.up.weight[expert] @ x
    if layer.up.bias is not None:
        hidden = hidden + layer.up.bias[expert]
    out = layer.down.weight[expert] @ activated(layer, hidden)
    return out if layer.down.bias is None else out + layer.down.bias[expert]


def activated(layer: SparseFeedForward, hidden: Tensor) -> Tensor:
    """Of one token."""
    if layer.activation == "swiglu":
        gate, value = hidden.split(len(hidden) // 2)
        return gate / (1 + (-gate).exp()) * value
    if layer.activation == "gelu":
        return hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return hidden.clamp(min=0) ** 2


def naive_forward(layer: SparseFeedForward, x: Tensor, chosen: Tensor) -> Tensor:
    """y = shared(x) + Σ_e gate_e · f_e(x), over chosen (N, E)."""
    tokens = x.reshape(-1, x.shape[-1])
    gates, rows = gates_of(layer, tokens), []
    for n, token in enumerate(tokens):
        total = torch.zeros_like(token)
        for e in range(gates.shape[1]):
            if chosen[n, e]:
                total = total + gates[n, e] * one_feed_forward(layer, e, token)
        if layer.shared is not None:
            up, down = layer.shared.up, layer.shared.down
            hidden = activated(layer, F.linear(token, up.weight, up.bias))
            total = total + F.linear(hidden, down.weight, down.bias)
        rows.append(total)
    return torch.stack(rows).view_as(x)
