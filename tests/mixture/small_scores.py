"""Held-out windows of two domains under a small mixture, a control and random shards."""

from collections.abc import Sequence
from typing import Any

import torch

from mixture.small_mixtures import small_mixture
from nn.small_experts import BOS, small_expert, text_of
from pyper.evaluate import HeldOut, Scores, score_held_out
from pyper.mixture import Mixture

PREFIXES = (3, 6, 9)
PRICES = (0.9, -0.4, 0.3, -0.8)
TEMPERATURE = 0.2


def small_held_out(length: int = 16) -> list[HeldOut]:
    """`verse` has 5 windows, `prose` 3."""
    windows = []
    for index, (domain, n) in enumerate((("verse", 5), ("prose", 3))):
        tokens = text_of(n, length + 1, seed=index)
        tokens[:, [0, 7]] = BOS
        windows.append(HeldOut(domain, tokens, bytes_per_token=2.5 + index))
    return windows


def mixture_of(router: str = "unigram", **changes: Any) -> Mixture:
    return small_mixture(router, temperature=TEMPERATURE, **changes)


def small_scores(
    router: str = "unigram", *, controls: bool = True, held_out: Sequence[HeldOut] | None = None
) -> list[Scores]:
    control = small_expert(50) if controls else None
    shards = [small_expert(seed) for seed in (60, 61, 62)] if controls else []
    windows = small_held_out() if held_out is None else held_out
    return score_held_out(mixture_of(router), windows, control=control, random_shards=shards)


def price_tensor() -> torch.Tensor:
    return torch.tensor(PRICES, dtype=torch.float64)
