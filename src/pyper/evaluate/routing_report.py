"""What the routed layers of a model do on held-out text, and whether expert choice would cheat."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F

from pyper.evaluate.losses import HeldOut, passes
from pyper.nn import Rule, Transformer
from pyper.routing import LayerStatistics, routing_summary, sum_statistics


def routing_report(model: Transformer, held_out: Sequence[HeldOut]) -> dict[str, Any]:
    """Losses in nats per token, and statistics of every routed layer.

    `causal` is the loss as evaluated and decoded, the only one to quote. `teacher_forced` is that
    of expert choice over batches of held-out text (null for token choice): it looks at later
    tokens, so `leak_gap`, teacher_forced − causal, mixes a leak with the change of rule. `layers`
    are those of the causal pass; `flip_rate` and `threshold_gap` compare them with expert choice.
    Their `max_violation` is over all text together (MaxVio_global of arXiv:2408.15664),
    `max_violation_batch` the mean over passes, each of one domain.
    """
    causal, passes_read = _read(model, held_out, None)
    layers = [sum_statistics(list(layer)) for layer in passes_read]
    numbers = [routing_summary(layer) for layer in layers]
    for own, parts in zip(numbers, passes_read, strict=True):
        own["max_violation_batch"] = fmean(routing_summary(p)["max_violation"] for p in parts)
    report: dict[str, Any] = {"causal": causal, "teacher_forced": None, "leak_gap": None}
    if model.config.routing.is_expert_choice:
        forced, forced_passes = _read(model, held_out, "expert_choice")
        report |= {"teacher_forced": forced, "leak_gap": round(forced - causal, 5)}
        for own, parts in zip(numbers, forced_passes, strict=True):
            compared = routing_summary(sum_statistics(list(parts)))
            own |= {key: compared[key] for key in ("flip_rate", "threshold_gap")}
    for own, layer in zip(numbers, layers, strict=True):
        own["load"] = (layer.expert_load / layer.n_tokens).tolist()  # type: ignore[assignment]
        own["fan_out"] = (layer.fan_out / layer.n_tokens).tolist()  # type: ignore[assignment]
    means = ("experts_per_token", "zero_expert_share", "router_entropy", "flip_rate")
    report |= {key: fmean(own[key] for own in numbers) for key in means}
    for key in ("max_violation", "max_violation_batch"):
        report[key] = max(own[key] for own in numbers)
    return report | {"layers": numbers}


@torch.no_grad()
def _read(
    model: Transformer, held_out: Sequence[HeldOut], rule: Rule | None
) -> tuple[float, list[tuple[LayerStatistics, ...]]]:
    """Mean loss, and for each layer the statistics of every pass."""
    total = 0.0
    parts: list[list[LayerStatistics]] = []
    for windows in held_out:
        counts = torch.ones(windows.tokens.shape)  # as wide, so that passes hold the same windows
        if windows.weights is not None:
            counts[:, 1:] = windows.weights
        both = zip(passes(windows.tokens, model), passes(counts, model), strict=True)
        for tokens, weights in both:
            reading = model.read(tokens[:, :-1], rule=rule)
            logits = model.head(reading.states).flatten(0, 1).float()
            losses = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
            total += float((losses * weights[:, 1:].flatten()).sum())
            parts.append([routed.statistics for routed in reading.routed])
    n_scored = sum(windows.n_scored for windows in held_out)
    return round(total / n_scored, 5), list(zip(*parts, strict=True))
