"""What a routed layer did with a pool of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerStatistics:
    """Of one layer and one pool; every field is a float32 tensor without gradient."""

    n_tokens: Tensor
    """(), padding left out."""
    expert_load: Tensor
    """(E,), tokens per expert."""
    fan_out: Tensor
    """(E + 1,), number of tokens that met 0, 1, … E experts."""
    router_entropy: Tensor
    """(), mean over tokens, nats, of the probabilities normalised over experts."""
    flip_rate: Tensor
    """(), share of (token, expert) pairs that expert choice and thresholds decide differently."""
    threshold_gap: Tensor
    """(), mean |k-th score − threshold| over experts; 0 where there is no threshold yet."""


def layer_statistics(
    chosen: Tensor,
    router_probs: Tensor,
    *,
    other: Tensor | None = None,
    threshold_gap: Tensor | None = None,
    padding: Tensor | None = None,
) -> LayerStatistics:
    """Statistics of chosen (N, E) bool and router_probs (N, E).

    other: (N, E), what the other rule (thresholds, or expert choice) would have chosen.
    threshold_gap: (), see `LayerStatistics`. padding: (N,), True where there is no token: such rows
    count nowhere, whatever they hold. Means over no token at all are 0.
    """
    if padding is not None:
        chosen, router_probs = chosen[~padding], router_probs[~padding]
        other = None if other is None else other[~padding]
    n_tokens, n_experts = chosen.shape
    zero = torch.zeros((), dtype=torch.float32, device=chosen.device)
    flips = zero if other is None else (chosen ^ other).sum()
    return LayerStatistics(
        n_tokens=zero + n_tokens,
        expert_load=chosen.sum(dim=0).float(),
        fan_out=_histogram(chosen.sum(dim=1), n_experts + 1),
        router_entropy=_entropy(router_probs.detach().float()).sum() / max(n_tokens, 1),
        flip_rate=flips / max(n_tokens * n_experts, 1),
        threshold_gap=zero if threshold_gap is None else threshold_gap.detach().float(),
    )


def _histogram(values: Tensor, size: int) -> Tensor:
    """(size,) float32: how often 0 … size − 1 occur; `torch.bincount` makes a GPU wait."""
    counts = torch.zeros(size, dtype=torch.float32, device=values.device)
    return counts.index_add_(0, values, torch.ones_like(values, dtype=torch.float32))


def _entropy(probs: Tensor) -> Tensor:
    """(N,) nats of probs (N, E) normalised over experts; 0 where all of a token's underflowed."""
    total = probs.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(probs.dtype).tiny)
    terms: Tensor = torch.special.entr(probs / total)
    return terms.sum(dim=-1)


def sum_statistics(parts: list[LayerStatistics]) -> LayerStatistics:
    """Of several pools of one layer, one at least: counts add up, means are weighted by tokens."""
    n_tokens = torch.stack([p.n_tokens for p in parts])

    def mean(values: list[Tensor]) -> Tensor:
        return (torch.stack(values) * n_tokens).sum() / n_tokens.sum().clamp(min=1)

    return LayerStatistics(
        n_tokens=n_tokens.sum(),
        expert_load=torch.stack([p.expert_load for p in parts]).sum(dim=0),
        fan_out=torch.stack([p.fan_out for p in parts]).sum(dim=0),
        router_entropy=mean([p.router_entropy for p in parts]),
        flip_rate=mean([p.flip_rate for p in parts]),
        threshold_gap=mean([p.threshold_gap for p in parts]),
    )


def routing_summary(statistics: LayerStatistics) -> dict[str, float]:
    """The numbers that are logged.

    `experts_per_token`, `zero_expert_share`, `max_violation` (largest load / mean load − 1:
    arXiv:2408.15664, eq. 4), `router_entropy`, `load_entropy` (nats), `flip_rate`,
    `threshold_gap`.
    """
    n_tokens = statistics.n_tokens.clamp(min=1)
    load = statistics.expert_load
    share = load / load.sum().clamp(min=1)
    return {
        "experts_per_token": float(load.sum() / n_tokens),
        "zero_expert_share": float(statistics.fan_out[0] / n_tokens),
        "max_violation": float(load.max() / load.mean().clamp(min=1e-9) - 1),
        "router_entropy": float(statistics.router_entropy),
        "load_entropy": float(torch.special.entr(share).sum()),
        "flip_rate": float(statistics.flip_rate),
        "threshold_gap": float(statistics.threshold_gap),
    }


def routing_record(layers: Sequence[LayerStatistics]) -> dict[str, Any]:
    """What a training step logs: means over layers, and the load and fan-out of each per token.

    Nothing without layers.
    """
    if not layers:
        return {}
    numbers = [routing_summary(layer) for layer in layers]
    means = {f"routing/{k}": fmean(n[k] for n in numbers) for k in numbers[0]}
    shares = {
        "routing/load": [layer.expert_load / layer.n_tokens for layer in layers],
        "routing/fan_out": [layer.fan_out / layer.n_tokens for layer in layers],
    }
    return means | {
        key: [[round(x, 4) for x in share.tolist()] for share in of_layers]
        for key, of_layers in shares.items()
    }
