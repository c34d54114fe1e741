"""Train the parts of a run: the seed, the experts, the controls. Each can be run alone."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pyper.checkpoint import load_checkpoint, verify_manifest
from pyper.checkpoint import write_json_atomically as write_json
from pyper.config import ExpertConfig, TrainConfig
from pyper.data import Documents
from pyper.errors import CheckpointError, ConfigError
from pyper.mixture.expert_folder import load_tensors_into
from pyper.nn import Transformer, init_weights
from pyper.nn.fp8_linear import use_fp8
from pyper.stages.assignment import ExpertData
from pyper.stages.context import Budget, Context, plan_budget
from pyper.stages.folder import read_json
from pyper.stages.start import start_tensors
from pyper.train import TrainingData, TrainPlan, TrainResult, train_expert
from pyper.train.freeze import freeze
from pyper.train.learning_rate import find_learning_rate
from pyper.train.progress import Progress
from pyper.train.recorded_step import RecordedStep
from pyper.train.schedule import branch_schedule, seed_schedule
from pyper.train.state import optimizer_state_of
from pyper.train.step import NewStep

Kind = Literal["seed", "control", "expert", "random-shard"]


@dataclass(frozen=True)
class Unit:
    """One thing to train: `seed`, `control`, `expert:3`, `random-shard:3`."""

    kind: Kind
    index: int = 0

    def __str__(self) -> str:
        has_index = self.kind in ("expert", "random-shard")
        return f"{self.kind}:{self.index}" if has_index else self.kind

    def folder(self, context: Context) -> Path:
        """Where it trains."""
        if self.kind == "expert":
            return context.folder.expert(self.index)
        if self.kind == "random-shard":
            return context.folder.random_shard(self.index)
        return context.folder.root / self.kind

    def title(self, assigned: ExpertData) -> str:
        """What people see."""
        return assigned.names[self.index] if self.kind == "expert" else str(self)


def parse_unit(text: str, names: list[str]) -> Unit:
    """`seed`, `control`, `expert:3`, `expert:law`, `random-shard:3`. Raises ConfigError."""
    kind, _, which = text.partition(":")
    if kind in ("seed", "control") and not which:
        return Unit(kind)  # type: ignore[arg-type]
    if kind in ("expert", "random-shard") and which:
        if which in names:
            return Unit(kind, names.index(which))  # type: ignore[arg-type]
        if which.isdigit() and int(which) < len(names):
            return Unit(kind, int(which))  # type: ignore[arg-type]
    raise ConfigError(
        f"`--only {text}` names no part of this run",
        hint=f"`seed`, `control`, or `expert:` and 0 … {len(names) - 1} or {', '.join(names)}",
    )


def units_of(context: Context) -> tuple[list[Unit], list[Unit]]:
    """What must come first (the seed), and what can then run side by side."""
    train = context.run.train
    first = [Unit("seed")] if train.seed_fraction > 0 else []
    # The control is as long as all experts together: begun first, it ends with them.
    rest = [Unit("control")] if train.control else []
    rest += [Unit("expert", i) for i in range(context.n_experts)]
    if train.random_shards:
        rest += [Unit("random-shard", i) for i in range(context.n_experts)]
    return first, rest


def finished_result(folder: Path) -> TrainResult | None:
    """The result of a part that is complete and whose weights verify; None otherwise."""
    saved = read_json(folder / "result.json")
    if saved is None:
        return None
    try:
        verify_manifest((folder / "best").resolve(), only=["model.safetensors"])
        return TrainResult(**saved)
    except (CheckpointError, TypeError):
        return None


def train_unit(
    context: Context,
    assigned: ExpertData,
    unit: Unit,
    progress: Progress,
    should_stop: Callable[[int], bool] | None = None,
    new_step: NewStep = RecordedStep,
) -> TrainResult:
    """Train one part to its end, from wherever it stands. Raises what `train_expert` raises."""
    folder = unit.folder(context)
    if (done := finished_result(folder)) is not None:
        return done
    config = _config_of(context, assigned, unit)
    data = _data_of(context, assigned, unit)
    model = _new_model(context, config, unit)
    optimizer_state = None
    if unit.kind != "seed" and context.run.train.seed_fraction > 0:
        optimizer_state = _branch_from_seed(context, model, config)
    plan = _plan(context, assigned, unit, config, data, optimizer_state)
    result = train_expert(
        model,
        data,
        config,
        plan,
        folder,
        track=context.run.track,
        progress=progress,
        should_stop=should_stop,
        new_step=new_step,
    )
    write_json(folder / "result.json", asdict(result))
    return result


def budget_of(context: Context, assigned: ExpertData) -> Budget:
    """Steps of every part."""
    return plan_budget(context.run, assigned.train_tokens(context), assigned.names)


def _config_of(context: Context, assigned: ExpertData, unit: Unit) -> TrainConfig:
    run = context.run
    if unit.kind == "expert":
        return run.expert_train(unit.index, assigned.names[unit.index])
    if unit.kind == "seed":  # branched from, not finished: stopping early would starve the rest
        return run.train.model_copy(update={"early_stopping": None})
    return run.train


def _data_of(context: Context, assigned: ExpertData, unit: Unit) -> TrainingData:
    train, valid = context.data.documents("train"), context.data.documents("valid")
    seq_len = context.run.data.seq_len
    if unit.kind == "expert":
        train = assigned.documents(context, "train", unit.index)
        own = assigned.documents(context, "valid", unit.index)
        # Without held-out text of its own an expert is judged on everybody's.
        valid = own if own.n_tokens > seq_len else valid
    elif unit.kind == "random-shard":
        train = _random_shard(context, train, unit.index)
    weights = context.run.data.weights
    if unit.kind == "expert":
        weights = context.run.domain_weights(unit.index, assigned.names[unit.index])
    return TrainingData(train, valid, seq_len, context.run.data.loader_workers, weights)


def _random_shard(context: Context, documents: Documents, index: int) -> Documents:
    shard = np.random.default_rng(context.run.run.random_seed).integers(
        context.n_experts, size=documents.n_documents
    )
    return documents.select(np.flatnonzero(shard == index))


def _new_model(context: Context, config: TrainConfig, unit: Unit) -> Transformer:
    """Fresh weights, or those of `start_from`; the control of a sparse model is dense."""
    is_dense = unit.kind == "control"
    model = Transformer(context.model.as_dense() if is_dense else context.model)
    if config.start_from is None:
        init_weights(model, context.run.run.random_seed)
    else:
        fingerprint = context.data.manifest.tokenizer_fingerprint
        load_tensors_into(model, start_tensors(config.start_from, fingerprint, context.start))
    freeze(model, config.freeze)
    if config.precision == "fp8":
        use_fp8(model.blocks)
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    return model.to(context.device, dtype)


def _branch_from_seed(
    context: Context, model: Transformer, config: TrainConfig
) -> dict[str, Any] | None:
    """Take over the seed's weights, and its optimizer states where they fit; returns those."""
    best = context.folder.seed / "best"
    if finished_result(context.folder.seed) is None:
        raise CheckpointError(
            "the seed is not trained to its end yet",
            hint=f"run `pyper train {context.folder.root} --only seed` first",
        )
    checkpoint = load_checkpoint(best)
    load_tensors_into(model, checkpoint.model)
    same_kind = config.optimizer == context.run.train.optimizer
    if config.reset_optimizer or not same_kind or config.precision != context.run.train.precision:
        return None
    return optimizer_state_of(checkpoint)


def _plan(
    context: Context,
    assigned: ExpertData,
    unit: Unit,
    config: TrainConfig,
    data: TrainingData,
    optimizer_state: dict[str, Any] | None,
) -> TrainPlan:
    budget = budget_of(context, assigned)
    rate = _learning_rate(context, unit, config, data)
    if unit.kind == "seed":
        steps, schedule = budget.seed, seed_schedule(config, budget.seed)
    else:
        steps = budget.control if unit.kind == "control" else budget.experts[unit.index]
        schedule = branch_schedule(config, steps, warm=optimizer_state is not None)
        rate *= config.branch_learning_rate_scale
    return TrainPlan(
        name=unit.title(assigned),
        total_steps=steps,
        schedule=schedule,
        learning_rate=rate,
        random_seed=_data_seed(context, unit),
        optimizer_state=optimizer_state,
    )


def _data_seed(context: Context, unit: Unit) -> int:
    """Every part reads in an order of its own: the control must not repeat the seed's."""
    offset = {"seed": 0, "control": 1, "expert": 2, "random-shard": 3}[unit.kind]
    return context.run.run.random_seed * 10_007 + offset * 1_009 + unit.index


def _learning_rate(context: Context, unit: Unit, config: TrainConfig, data: TrainingData) -> float:
    """The configured rate, or for "auto" the best of a short sweep (made once, by the seed)."""
    if config.learning_rate != "auto":
        return config.learning_rate
    with_seed = context.run.train.seed_fraction > 0
    folder = context.folder.seed if with_seed else unit.folder(context)
    saved = read_json(folder / "learning_rate.json")
    if saved is None:
        saved = find_learning_rate(
            lambda: _new_model(context, config, unit), data, config, context.console
        )
        write_json(folder / "learning_rate.json", saved)
    return float(saved["learning_rate"])


def load_trained(folder: Path, device: torch.device) -> Transformer:
    """The best weights of a trained part, in evaluation mode. Raises CheckpointError."""
    if not (folder / "best").exists():
        raise CheckpointError(
            f"{folder} is not trained yet", hint="`pyper train` the run to its end"
        )
    checkpoint = load_checkpoint(folder / "best")
    model = Transformer(ExpertConfig.model_validate(checkpoint.state["model_config"]))
    dtype = checkpoint.model["embedding.weight"].dtype
    model = model.to(device, dtype)
    load_tensors_into(model, checkpoint.model)
    return model.eval()
