"""The whole run file, and the training settings of each part of a run."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from pyper.config.base import Section
from pyper.config.data import DataConfig, Weight
from pyper.config.expert import ExpertConfig
from pyper.config.mixture import EvaluateConfig, MixtureConfig
from pyper.config.train import TrainConfig
from pyper.errors import ConfigError

_BUDGETS = ("epochs", "tokens", "steps")
# Settings of the whole run: an expert cannot have its own.
_RUN_WIDE = {"seed_fraction", "control", "random_shards", "start_from"}


class RunSection(Section):
    """Where a run lives and how it is carried out."""

    folder: Path | None = None
    """Default: `runs/` and the name of the run file."""
    random_seed: int = Field(default=0, ge=0)
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    jobs: int = Field(default=1, ge=1, le=256)
    """Experts (and the control) trained at the same time, each in a process of its own."""
    parallel_experts: bool | Literal["auto"] = "auto"
    """Take the steps of all at once, in batched products of one process; `auto`: on a GPU, where
    experts are dense, small and not in fp8. Same results but for rounding."""


class TrackConfig(Section):
    """Trackers beside `metrics.jsonl`, which is always written."""

    tensorboard: bool = False
    wandb: str | None = None
    """Project name; needs the `track` extra."""


class ExpertData(Section):
    """`data` of an `[[expert]]`: what it reads differently."""

    weights: dict[str, Weight] = Field(default_factory=dict)
    """In place of those of `[data]`."""


class ExpertOverride(Section):
    """`[[expert]]`: what differs for one expert. Any key of `[train]`, its own budget, and
    `data.weights`."""

    name: str | None = None
    """The domain (`assign = "folder"`), or a name for the expert at `index`."""
    index: int | None = Field(default=None, ge=0)
    data: ExpertData | None = None
    train: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, raw: Any) -> Any:
        """Keys beside these three are training settings, checked against `[train]`."""
        if not isinstance(raw, dict) or "train" in raw:
            return raw
        own = {key: raw[key] for key in ("name", "index", "data") if key in raw}
        return own | {"train": {key: value for key, value in raw.items() if key not in own}}

    @model_validator(mode="after")
    def _says_which(self) -> "ExpertOverride":
        if self.name is None and self.index is None:
            raise ConfigError(
                "an `[[expert]]` has neither `name` nor `index`",
                hint='say which one: `name = "law"` or `index = 3`',
            )
        if fixed := sorted(_RUN_WIDE & self.train.keys()):
            raise ConfigError(
                f"`{fixed[0]}` belongs to the whole run, not to one `[[expert]]`",
                hint="move it to `[train]`",
            )
        return self


class RunConfig(Section):
    """A run file, resolved."""

    run: RunSection = RunSection()
    data: DataConfig = DataConfig()
    model: ExpertConfig = ExpertConfig()
    mixture: MixtureConfig = MixtureConfig()
    train: TrainConfig = TrainConfig(epochs=1)
    evaluate: EvaluateConfig = EvaluateConfig()
    track: TrackConfig = TrackConfig()
    expert: tuple[ExpertOverride, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _one_model(cls, raw: Any) -> Any:
        """A sparse model, or one that goes on from a saved one, is trained alone by default."""
        if not isinstance(raw, dict):
            return raw
        given = {key: raw.get(key) for key in ("model", "mixture", "train")}
        sections = {key: dict(v) if isinstance(v, dict) else {} for key, v in given.items()}
        starts = sections["train"].get("start_from") is not None
        if sections["model"].get("kind", "dense") == "dense" and not starts:
            return raw
        mixture: dict[str, Any] = {"n_experts": 1, "router": "experts"} | sections["mixture"]
        if mixture["n_experts"] == 1:
            mixture.setdefault("top_k", 1)
        train: dict[str, Any] = {"seed_fraction": 0.0, "control": not starts} | sections["train"]
        return raw | {"mixture": mixture, "train": train}

    @model_validator(mode="after")
    def _starts_from_one_place(self) -> "RunConfig":
        train = self.train
        if train.start_from is not None and (train.control or train.seed_fraction):
            raise ConfigError(
                "`train.start_from` takes the place of a seed, and its control is another run",
                hint="leave out `seed_fraction` and `control`; for a control, continue the dense "
                'model in a run of its own: `start_from = "runs/NAME/control/best"`',
            )
        if self.model.kind != "dense" and train.seed_fraction and train.control:
            raise ConfigError(
                f'`kind = "{self.model.kind}"` has a dense control, which cannot branch from a '
                "sparse seed",
                hint="set `train.seed_fraction = 0`: both are then trained from scratch",
            )
        return self

    @model_validator(mode="after")
    def _goes_side_by_side(self) -> "RunConfig":
        if self.run.parallel_experts is not True:
            return self
        given = ""
        if self.model.kind != "dense":
            given = f'`model.kind = "{self.model.kind}"`'
        elif self.train.precision == "fp8":
            given = '`train.precision = "fp8"`'
        if given:
            raise ConfigError(
                f"`run.parallel_experts` is for dense experts in 16 or 32 bits, not for {given}",
                hint='leave it at "auto"; `run.jobs` trains several in processes of their own',
            )
        return self

    @model_validator(mode="after")
    def _batches_hold_sequences(self) -> "RunConfig":
        seq_len = self.data.seq_len
        for train in [self.train, *(merge_train(self.train, own) for own in self.expert)]:
            if train.global_batch_tokens % seq_len:
                raise ConfigError(
                    f"`train.global_batch_tokens` ({train.global_batch_tokens:,}) is not a "
                    f"multiple of `data.seq_len` ({seq_len:,})",
                    hint=f"use e.g. {max(1, train.global_batch_tokens // seq_len) * seq_len:,}",
                )
        if 0 < self.model.seq_len < seq_len:
            raise ConfigError(
                f"`model.seq_len` ({self.model.seq_len}) is shorter than "
                f"`data.seq_len` ({seq_len})",
                hint="leave `model.seq_len` out: it follows `data.seq_len`",
            )
        return self

    def override_of(self, index: int, name: str | None = None) -> ExpertOverride | None:
        """The `[[expert]]` of one expert, by its name or else its number."""
        for override in self.expert:
            if override.index == index or (name is not None and override.name == name):
                return override
        return None

    def expert_train(self, index: int, name: str | None = None) -> TrainConfig:
        """`[train]` with what one `[[expert]]` changes."""
        override = self.override_of(index, name)
        return self.train if override is None else merge_train(self.train, override)

    def domain_weights(self, index: int, name: str | None = None) -> dict[str, float]:
        """How often one expert sees each domain: its own `data.weights`, or else the run's."""
        override = self.override_of(index, name)
        own = None if override is None else override.data
        return self.data.weights if own is None else own.weights

    def has_own_budget(self, index: int, name: str | None = None) -> bool:
        """Whether an `[[expert]]` says how long it trains on its own data."""
        override = self.override_of(index, name)
        return override is not None and any(key in override.train for key in _BUDGETS)


def merge_train(train: TrainConfig, override: ExpertOverride) -> TrainConfig:
    """`[train]` with the keys of one `[[expert]]` in place; its budget replaces the run's."""
    values = train.model_dump()
    if any(key in override.train for key in _BUDGETS):
        values |= dict.fromkeys(_BUDGETS)
    return TrainConfig.model_validate(values | override.train)
