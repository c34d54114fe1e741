"""`[train]`: how an expert is trained. Every key may differ by expert."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from pyper.config.base import Section
from pyper.errors import ConfigError

_UNITS = {"k": 1_000, "m": 1_000_000, "b": 1_000_000_000, "t": 1_000_000_000_000}


def _parse_count(value: object) -> object:
    """`"2B"` and `"300M"` are numbers of tokens."""
    if isinstance(value, str) and value and value[-1].lower() in _UNITS:
        try:
            return round(float(value[:-1]) * _UNITS[value[-1].lower()])
        except ValueError:
            return value
    return value


Part = Literal["embedding", "attention", "feed_forward", "router", "norm", "head"]
Count = Annotated[int, BeforeValidator(_parse_count), Field(gt=0)]


class EarlyStoppingConfig(Section):
    """Stop when validation no longer improves, and keep the best weights."""

    patience: int = Field(default=5, gt=0)
    """Validations without improvement before stopping."""
    min_delta: float = Field(default=0.0, ge=0)
    """Improvement in nats per token that counts."""


class TrainConfig(Section):
    """One training run. The budget is `epochs`, `tokens` or `steps`: exactly one."""

    seed_fraction: float = Field(default=0.5, ge=0, lt=1)
    """Share of the budget that the common seed takes; 0 trains experts from scratch."""
    control: bool = True
    """Also train the dense control: the seed, continued on everything, for as many steps."""
    random_shards: bool = False
    """Also train experts on random shards, a second control (doubles the cost of the experts)."""

    start_from: Path | None = None
    """A saved model (from `pyper merge`, a run of one model, or a checkpoint) to train on from;
    its shape replaces `[model]`."""
    freeze: tuple[Part, ...] = ()
    """Parts that keep their weights."""

    epochs: float | None = Field(default=None, gt=0)
    tokens: Count | None = None
    """A number, or e.g. `"300M"` or `"2B"`."""
    steps: int | None = Field(default=None, gt=0)

    global_batch_tokens: Count = 65_536
    """Tokens per optimizer step."""
    micro_batch_size: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    """Sequences per forward pass; `"auto"` finds the largest that fits."""

    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = 1e-3
    """Peak rate; `"auto"` tries a few in short runs and keeps the best on validation."""
    min_learning_rate: float = Field(default=0.0, ge=0)
    """Where the schedule ends."""
    warmup_steps: int | None = Field(default=None, ge=0)
    warmup_fraction: float = Field(default=0.02, ge=0, le=1)
    """Share of the steps, where `warmup_steps` is not given."""
    schedule: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    decay_fraction: float = Field(default=0.5, gt=0, le=1)
    """Share of a run's steps in which `wsd` decays, linearly, to `min_learning_rate`."""
    branch_learning_rate_scale: float = Field(default=1.0, gt=0)
    """Experts and control start at this share of the seed's peak rate."""

    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """`muon` for the matrices of the blocks (AdamW for the rest); `adamw8bit` is `adamw` with
    `state_bits = 8`."""
    state_bits: Literal[8, 32] = 32
    """Of the optimizer's moments: 8 take a quarter of the memory."""
    weights: Literal["split", "stochastic"] = "split"
    """Of bf16 weights. `split` is exact: 2 bytes beside each hold the rest of a float32.
    `stochastic` keeps nothing and rounds at random, right on average."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    adam_eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    """On matrices only; norms, biases and embeddings are left alone."""
    muon_learning_rate: float = Field(default=0.02, gt=0)
    """Peak rate of the matrices under `muon`."""
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    gradient_clip: float | None = Field(default=1.0, gt=0)
    """Largest global gradient norm."""
    reset_optimizer: bool = False
    """Experts and control start from fresh optimizer states instead of the seed's."""

    early_stopping: EarlyStoppingConfig | None = None
    eval_every: int = Field(default=250, gt=0)
    """Steps between validations (and checkpoints)."""
    eval_tokens: Count = 65_536
    """Validation tokens per domain during training."""
    keep_checkpoints: int = Field(default=2, gt=0)
    """Most recent checkpoints kept, beside the best."""
    log_every: int = Field(default=10, gt=0)
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """`bf16`: weights, gradients and activations in bf16; updates exact in fp32 (see `weights`).
    `auto`: bf16 where the device multiplies it natively, else fp32. `fp8`: as bf16, but the
    products of the blocks in 8 bits (Hopper and newer; head, routers and experts of sparse layers
    stay)."""
    recompute_blocks: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Blocks that compute their activations again in the backward pass: a third more work there, a
    fraction of the memory. `auto`: as few as it takes for a micro-batch to fit the GPU."""
    compile: bool = False
    """torch.compile each block (needs a C++ compiler on CPU)."""

    @model_validator(mode="after")
    def _one_budget(self) -> "TrainConfig":
        given = [key for key in ("epochs", "tokens", "steps") if getattr(self, key) is not None]
        if len(given) != 1:
            what = "none of them" if not given else " and ".join(f"`{key}`" for key in given)
            raise ConfigError(
                f"`[train]` takes exactly one of `epochs`, `tokens` and `steps`, not {what}",
                hint="for example `epochs = 4`",
            )
        return self
