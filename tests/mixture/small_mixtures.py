"""Mixtures small enough for a test, of experts that disagree about every text."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nn.small_experts import BOS, small_expert
from pyper.mixture import LMRouter, Mixture, MixtureSettings, PrefixRouter, UnigramRouter
from pyper.nn import Transformer

NAMES = ("law", "maths", "novels", "code")
MODES: list[dict[str, Any]] = [
    {"mixing": "posterior", "top_k": 1},
    {"mixing": "posterior", "top_k": 2},
    {"mixing": "posterior", "top_k": 4},
    {"mixing": "top1"},
    {"mixing": "window"},
]
ROUTERS = ("unigram", "lm", "experts")


def small_settings(**changes: Any) -> MixtureSettings:
    values: dict[str, Any] = {
        "experts": NAMES,
        "tokenizer_fingerprint": "",
        "bos_id": BOS,
        "seq_len": 48,
        "prefix_tokens": 6,
        "window": 5,
        "temperature": 0.2,
        "prune": 0.0,
    }
    return MixtureSettings(**values | changes)


def small_experts(n: int = 4, **shape: Any) -> list[Transformer]:
    return [small_expert(seed, std=0.4, **shape) for seed in range(n)]


def loaders_of(models: Sequence[Transformer]) -> list[Callable[[], Transformer]]:
    return [lambda model=model: model for model in models]


def small_counts(n: int = 4, vocab_size: int = 17) -> Tensor:
    """(n, V), token frequencies that differ between experts; some tokens were never read."""
    generator = torch.Generator().manual_seed(3)
    counts = 400 * torch.rand(n, vocab_size, generator=generator) ** 4
    return counts.long()


def small_router(kind: str, n: int = 4, vocab_size: int = 17) -> PrefixRouter | None:
    if kind == "unigram":
        return UnigramRouter(small_counts(n, vocab_size))
    if kind == "lm":
        seeds = range(100, 100 + n)
        return LMRouter([small_expert(s, n_layers=1, vocab_size=vocab_size) for s in seeds])
    return None


def small_mixture(
    router: str = "unigram", resident: int | None = None, vocab_size: int = 17, **changes: Any
) -> Mixture:
    """Four experts; `changes` are of the settings."""
    settings = small_settings(router=router, **changes)
    experts = small_experts(vocab_size=vocab_size)
    return Mixture(
        settings, loaders_of(experts), small_router(router, 4, vocab_size), resident=resident
    )


class Shelf:
    """Loaders that know which of their experts are in memory, and how much each has read."""

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[Transformer] = weakref.WeakSet()
        self.most = 0
        self.loaded: list[int] = []
        self.n_read = [0] * 4
        """Tokens that each expert read, padding included."""

    def loader(self, index: int) -> Callable[[], Transformer]:
        def load() -> Transformer:
            model = small_expert(index, std=0.4)
            self.alive.add(model)
            self.most = max(self.most, len(self.alive))
            self.loaded.append(index)
            model.embedding.register_forward_pre_hook(
                lambda _, args: self._count(index, args[0].numel())
            )
            return model

        return load

    def _count(self, index: int, n_tokens: int) -> None:
        self.n_read[index] += n_tokens

    def mixture(
        self, resident: int | None = None, router: str = "unigram", **changes: Any
    ) -> Mixture:
        loaders = [self.loader(e) for e in range(4)]
        settings = small_settings(router=router, **changes)
        return Mixture(settings, loaders, small_router(router), resident=resident)
