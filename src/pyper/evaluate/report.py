"""`evaluation.json`: every arm, overall and by domain."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyper.evaluate.mixture_losses import Rows, Scores, losses_of_modes

Result = dict[str, Any]


def evaluation_report(
    scores: Sequence[Scores],
    *,
    experts: Sequence[str],
    temperature: float,
    prefixes: Sequence[int],
    prices: Tensor | None,
) -> Result:
    """All numbers of an evaluation: nats per token unless named otherwise; null where not run."""
    rows = [
        losses_of_modes(s, temperature=temperature, prefixes=prefixes, prices=prices)
        for s in scores
    ]
    n_tokens = [s.n_tokens for s in scores]
    overall = _summary(rows, n_tokens)
    n_bytes = sum(s.bytes_per_token * s.n_tokens for s in scores)
    tokens = sum(n_tokens)
    return {
        "tokens": tokens,
        "bytes": round(n_bytes),
        **overall,
        "load": _load(rows, len(experts)),
        "router_entropy": _mean([r.entropy for r in rows], n_tokens),
        "bits_per_byte": _derived(overall, lambda x: x * tokens / n_bytes / math.log(2)),
        "perplexity": _derived(overall, math.exp),
        "temperature": temperature,
        "expert_names": list(experts),
        "prefix_and_rest": _prefix_and_rest(rows, prefixes),
        "by_domain": {
            s.domain: _summary([row], [s.n_tokens])
            | {"tokens": s.n_tokens, "load": _load([row], len(experts))}
            for s, row in zip(scores, rows, strict=True)
        },
    }


def _summary(rows: Sequence[Rows], n_tokens: Sequence[int]) -> Result:
    def mean(losses: Sequence[Tensor | None]) -> float | None:
        return None if any(loss is None for loss in losses) else _mean(losses, n_tokens)

    n_experts = rows[0].experts.shape[-1]
    return {
        "control": mean([r.control for r in rows]),
        "experts": [mean([r.experts[..., e] for r in rows]) for e in range(n_experts)],
        "oracle": mean([r.oracle for r in rows]),
        "routed": {str(n): mean([r.routed[n] for r in rows]) for n in rows[0].routed},
        "routed_with_prices": mean([r.routed_with_prices for r in rows]),
        "posterior": {k: mean([r.posterior[k] for r in rows]) for k in rows[0].posterior},
        "random_shards": mean([r.random_shards for r in rows]),
    }


def _mean(parts: Sequence[Tensor | None], n_tokens: Sequence[int]) -> float:
    """Mean over the tokens that count: every domain by its number of them."""
    total = sum(float(part.double().sum()) for part in parts if part is not None)
    return round(total / sum(n_tokens), 5)


def _load(rows: Sequence[Rows], n_experts: int) -> list[float]:
    """Share of the windows that the middle prefix sends to each expert."""
    chosen = torch.cat([row.chosen for row in rows])
    counts = torch.bincount(chosen, minlength=n_experts)
    return [round(float(c) / len(chosen), 4) for c in counts]


def _derived(overall: Result, convert: Callable[[float], float]) -> Result:
    """The headline arms in another unit."""
    arms = {
        "control": overall["control"],
        "oracle": overall["oracle"],
        **{f"routed_{n}": value for n, value in overall["routed"].items()},
        **{f"posterior_{k}": value for k, value in overall["posterior"].items()},
    }
    return {k: None if v is None else round(convert(v), 5) for k, v in arms.items()}


def _prefix_and_rest(rows: Sequence[Rows], prefixes: Sequence[int]) -> Result:
    """Routed losses before (cold start) and after the decision, beside the control's."""
    result: Result = {}
    length = rows[0].oracle.shape[1]
    weights = [r.weights for r in rows]
    for n in prefixes:
        cut = min(n, length)
        parts = {"prefix": slice(0, cut), "rest": slice(cut, length)}
        result[str(n)] = {
            name: {
                "routed": _part_mean([r.routed[n] for r in rows], part, weights),
                "control": _part_mean([r.control for r in rows], part, weights),
            }
            for name, part in parts.items()
        }
    return result


def _part_mean(
    losses: Sequence[Tensor | None], part: slice, weights: Sequence[Tensor]
) -> float | None:
    cut = [loss[:, part] for loss in losses if loss is not None]
    n_tokens = [int(w[:, part].sum()) for w in weights]
    if len(cut) < len(losses) or sum(n_tokens) == 0:
        return None
    return _mean(cut, n_tokens)
