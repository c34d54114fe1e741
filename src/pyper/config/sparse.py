"""`[model.sparse]`: experts inside one model, chosen token by token."""

from typing import Literal

from pydantic import Field, model_validator

from pyper.config.base import Section
from pyper.errors import ConfigError

Routing = Literal["expert_choice", "threshold", "capped", "token_choice"]
Gate = Literal["softmax", "sigmoid"]
Balance = Literal["loss", "sign_bias", "quantile_bias", "none"]


class SparseConfig(Section):
    """Who reads which token, in `kind = "sparse"` and `kind = "token_mixture"`."""

    n_experts: int = Field(default=8, ge=2, le=1024)
    every: int = Field(default=1, gt=0)
    """Every n-th feed-forward is sparse, the last of each n (1: all of them)."""
    stem_layers: int = Field(default=1, ge=0)
    """`token_mixture`: blocks that all tokens pass before the experts take their choice."""
    routing: Routing = "expert_choice"
    """In training. `expert_choice`: each expert takes its C highest tokens of the micro-batch;
    `threshold`: the same until `threshold_after`, then every token above an expert's threshold;
    `capped`: expert choice with at most `max_experts_per_token`; `token_choice`: each token takes
    its `top_k` experts. All but the last are evaluated and decoded by thresholds."""
    gate: Gate = "softmax"
    """Weights on the outputs, over the experts of a token, or each expert on its own."""
    capacity_factor: float = Field(default=1.0, gt=0)
    """Mean number of experts that process one token: 1 costs as much as a dense layer."""
    shared_d_ff: int = Field(default=0, ge=0)
    """Width of a feed-forward that every token passes beside the chosen ones; 0 leaves it out."""
    attention_experts: int = Field(default=0, ge=0, le=1024)
    """`kind = "sparse"` only: so many attentions in every layer, all of which run and are mixed by
    softmax gates (arXiv:2408.08274), each with keys and values of its own; 0 is one, without
    gates."""
    threshold_decay: float = Field(default=0.99, ge=0, lt=1)
    """Of the moving average of k-th scores: 1/(1 − decay) steps are 5 to 10 % of a training."""
    threshold_after: float = Field(default=0.2, ge=0, le=1)
    """Share of the steps after which `threshold` trains by thresholds."""
    max_experts_per_token: int = Field(default=2, gt=0)
    """`capped` only."""
    top_k: int = Field(default=1, gt=0)
    """`token_choice` only: experts per token."""
    normalize_gates: bool = False
    """`token_choice` only: divide the gates of a token's experts by their sum, so that equal
    experts give what one of them gives: merged and upcycled models start from it. With `top_k = 1`
    the gate is then always 1, and only the auxiliary losses teach the router."""
    balance: Balance = "loss"
    """`token_choice` only: an auxiliary loss, or a bias moved by the sign of the excess load, or
    by quantiles of the scores."""
    load_balancing_weight: float = Field(default=0.01, ge=0)
    router_z_weight: float = Field(default=1e-3, ge=0)
    """`token_choice` only: weights of the two auxiliary losses."""
    bias_rate: float = Field(default=1e-3, gt=0, le=1)
    """Step of `sign_bias`; share of the way for `quantile_bias` (try 0.1)."""

    @model_validator(mode="after")
    def _fits(self) -> "SparseConfig":
        limits = {
            "capacity_factor": "`1.0` costs as much as a dense layer, `2.0` as top-2 routing",
            "max_experts_per_token": "at `n_experts` it is plain expert choice",
            "top_k": "`1` costs as much as a dense layer, `2` twice that",
        }
        for key, hint in limits.items():
            if getattr(self, key) > self.n_experts:
                raise ConfigError(
                    f"`model.sparse.{key}` must be in (0, {self.n_experts}], "
                    f"not {getattr(self, key)}",
                    hint=hint,
                )
        if self.routing == "capped" and self.capacity_factor > self.max_experts_per_token:
            raise ConfigError(
                f"`model.sparse.capacity_factor` ({self.capacity_factor:g}) is more than "
                f"`max_experts_per_token` ({self.max_experts_per_token}) lets through",
                hint="raise `max_experts_per_token`, or lower `capacity_factor`",
            )
        if self.normalize_gates and self.is_expert_choice:
            raise ConfigError(
                f'`model.sparse.normalize_gates` does not go with `routing = "{self.routing}"`: '
                "the number of experts that take a token is not to change their weight",
                hint='leave it out, or use `routing = "token_choice"`',
            )
        if self.balance == "quantile_bias" and self.top_k == self.n_experts:
            raise ConfigError(
                "`model.sparse.top_k` takes every expert: there is nothing to balance",
                hint='lower `top_k`, or set `balance = "none"`',
            )
        return self

    @property
    def is_expert_choice(self) -> bool:
        """Whether experts choose tokens, and thresholds decide after training."""
        return self.routing != "token_choice"

    @property
    def experts_per_token(self) -> float:
        """On average, as trained."""
        return self.capacity_factor if self.is_expert_choice else float(self.top_k)
