"""What must survive a restart, and how it goes into and out of checkpoints."""

from dataclasses import dataclass
from typing import Any

import torch

from pyper.checkpoint import (
    Checkpoint,
    CheckpointStore,
    capture_rng,
    flatten_state,
    restore_rng,
    unflatten_state,
)
from pyper.data import Loader
from pyper.mixture.expert_folder import load_tensors_into, model_tensors
from pyper.nn import Transformer
from pyper.train.early_stopping import EarlyStopping
from pyper.train.optimizer import ExpertOptimizer
from pyper.train.progress import Progress


@dataclass
class TrainState:
    """Everything that changes while one expert trains."""

    model: Transformer
    optimizer: ExpertOptimizer
    loader: Loader
    stopping: EarlyStopping
    step: int = 0
    """Updates made."""
    seconds: float = 0.0
    """Spent training, over all processes that worked on it."""
    finished: bool = False


def save(state: TrainState, store: CheckpointStore, *, best: bool) -> None:
    """Write one checkpoint, atomically."""
    tensors, skeleton = flatten_state(
        {"optimizer": state.optimizer.state_dict(), "rng": capture_rng()}
    )
    facts: dict[str, Any] = {
        "step": state.step,
        "seconds": state.seconds,
        "finished": state.finished,
        "early_stopping": state.stopping.state_dict(),
        "loader": state.loader.state_dict(),
        "model_config": state.model.config.model_dump(),
        "nested": skeleton,
    }
    store.save(state.step, model_tensors(state.model), tensors, facts, best=best)


def optimizer_state_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The optimizer's part of a checkpoint, to branch from."""
    nested = unflatten_state(checkpoint.optimizer, checkpoint.state["nested"])
    optimizer: dict[str, Any] = nested["optimizer"]
    return optimizer


def restore(state: TrainState, store: CheckpointStore, progress: Progress) -> None:
    """Go on from the newest sound checkpoint, where there is one."""
    checkpoint = store.load_latest()
    for warning in store.warnings:
        progress.warn(warning)
    if checkpoint is None:
        return
    nested = unflatten_state(checkpoint.optimizer, checkpoint.state["nested"])
    load_tensors_into(state.model, checkpoint.model)
    state.optimizer.load_state_dict(nested["optimizer"])
    state.loader.load_state_dict(checkpoint.state["loader"])
    state.stopping.load_state_dict(checkpoint.state["early_stopping"])
    state.step = checkpoint.state["step"]
    state.seconds = checkpoint.state["seconds"]
    state.finished = checkpoint.state["finished"]
    restore_rng(nested["rng"])
    if checkpoint.metadata["threads"] != torch.get_num_threads():
        progress.warn(
            f"saved with {checkpoint.metadata['threads']} threads, going on with "
            f"{torch.get_num_threads()}: sums may differ in the last bit"
        )
