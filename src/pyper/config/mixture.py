"""`[mixture]` and `[evaluate]`: how experts divide the data, are joined, and are judged."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pyper.config.base import Section
from pyper.config.train import Count
from pyper.errors import ConfigError

Mixing = Literal["top1", "posterior", "window"]
Router = Literal["unigram", "lm", "experts"]


class MixtureConfig(Section):
    """Experts, the data they get, and how one model is made of them."""

    n_experts: int = Field(default=8, ge=1, le=1024)
    assign: Literal["discover", "folder"] = "discover"
    """`discover`: balanced EM over documents; `folder`: one domain of the data per expert."""
    discover_scores: Literal["unigram", "lm"] = "unigram"
    discover_rounds: int = Field(default=20, ge=1)
    router: Router = "unigram"
    """Who reads the prefix: token frequencies, tiny language models, or the experts themselves."""
    mixing: Mixing = "posterior"
    prefix_tokens: int = Field(default=32, ge=1)
    """Tokens that `top1` sees before it settles on one expert."""
    window: int = Field(default=64, ge=1)
    """Tokens between decisions of `window`."""
    temperature: float | Literal["auto"] = "auto"
    """τ of the posterior w ∝ p^τ; `"auto"` fits it on validation."""
    top_k: int = Field(default=2, ge=1)
    """Experts mixed at each token by `posterior`."""
    prune: float = Field(default=1e-3, ge=0, lt=0.5)
    """While generating, an expert whose weight falls below this stops running."""
    price_scale: float = Field(default=0.0, ge=0, le=1)
    """Share of the training prices applied at inference: 0 routes for quality, 1 for equal load.
    Read by `top1` and `window`."""

    @model_validator(mode="after")
    def _top_k_fits(self) -> "MixtureConfig":
        if self.top_k > self.n_experts:
            raise ConfigError(
                f"`mixture.top_k` must be at most `n_experts` ({self.n_experts}), not {self.top_k}",
                hint="`1` costs one expert per token, `2` two",
            )
        if self.temperature != "auto" and not 0 < self.temperature <= 1:
            raise ConfigError(
                f'`mixture.temperature` must be in (0, 1] or "auto", not {self.temperature}',
                hint="`0.1` is a good start",
            )
        return self


class EvaluateConfig(Section):
    """How much held-out text decides."""

    split: Literal["valid", "test"] = "test"
    tokens: Count = 262_144
    """Tokens per domain at most."""
    prefixes: tuple[Annotated[int, Field(gt=0)], ...] = Field(default=(16, 32, 64), min_length=1)
    """Prefix lengths of the routed rows."""
