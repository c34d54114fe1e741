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
from pyper.errors import CheckpointError
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
        "threads": torch.get_num_threads(),
        "nested": skeleton,
    }
    store.save(state.step, model_tensors(state.model), tensors, facts, best=best)


def model_tensors(model: Transformer) -> dict[str, torch.Tensor]:
    """The weights by name, a tied head left out (the input table is the same matrix)."""
    tied = {"head.weight"} if model.config.tie_embeddings else set()
    return {name: t for name, t in model.state_dict().items() if name not in tied}


def load_model_tensors_into(model: Transformer, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of `model_tensors`. Raises CheckpointError when names or shapes differ."""
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights do not fit the model: {str(error).splitlines()[1].strip()}",
            hint="the checkpoint was made with another `[model]`; use another run folder",
        ) from None
    if unexpected or set(missing) - ({"head.weight"} if model.config.tie_embeddings else set()):
        raise CheckpointError(
            f"the checkpoint has other weights than the model, e.g. `{(missing + unexpected)[0]}`",
            hint="it was made with another `[model]`; use another run folder",
        )


def optimizer_state_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The optimizer's part of a checkpoint, to branch from."""
    nested = unflatten_state(checkpoint.optimizer, checkpoint.state["nested"])
    optimizer: dict[str, Any] = nested["optimizer"]
    return optimizer


def restore(state: TrainState, store: CheckpointStore, progress: Progress) -> None:
    """Go on from the newest sound checkpoint, where there is one."""
    checkpoint = store.load_latest(device=state.model.device)
    for warning in store.warnings:
        progress.warn(warning)
    if checkpoint is None:
        return
    nested = unflatten_state(checkpoint.optimizer, checkpoint.state["nested"])
    load_model_tensors_into(state.model, checkpoint.model)
    state.optimizer.load_state_dict(nested["optimizer"])
    state.loader.load_state_dict(checkpoint.state["loader"])
    state.stopping.load_state_dict(checkpoint.state["early_stopping"])
    state.step = checkpoint.state["step"]
    state.seconds = checkpoint.state["seconds"]
    state.finished = checkpoint.state["finished"]
    restore_rng(nested["rng"])
    if checkpoint.state["threads"] != torch.get_num_threads():
        progress.warn(
            f"saved with {checkpoint.state['threads']} threads, going on with "
            f"{torch.get_num_threads()}: sums may differ in the last bit"
        )
