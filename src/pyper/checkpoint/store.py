"""The checkpoints of one training run: `checkpoints/step-0000400/` and the link `best`."""

import json
import os
import platform
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from pyper.checkpoint.atomic import (
    remove_folder,
    storage_errors,
    sweep,
    write_folder_atomically,
)
from pyper.checkpoint.manifest import (
    FileEntry,
    Json,
    Manifest,
    canonical_json,
    read_manifest,
    verify_manifest,
)
from pyper.checkpoint.tensors import read_tensors, tensor_bytes, write_tensors
from pyper.errors import CheckpointError

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_ROOM = 1.2  # share of a checkpoint's size that must be free before it is begun


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint holds. The tensors are copies: nothing keeps its files open."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    metadata: dict[str, Any]
    path: Path


class CheckpointStore:
    """Saves, prunes and finds the checkpoints of one folder. One writer at a time: `folder_lock`.

    `keep_last` most recent checkpoints stay, and the best. `metadata` (fingerprints of
    configuration and data, …) goes into every manifest. `warnings` collects what a caller should
    show.
    """

    def __init__(
        self, folder: Path, *, keep_last: int = 2, metadata: Mapping[str, Json] | None = None
    ) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.metadata = dict(metadata or {})
        self.warnings: list[str] = []
        self._checkpoints = folder / "checkpoints"

    def save(
        self,
        step: int,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        state: Mapping[str, Json],
        *,
        best: bool = False,
    ) -> Path:
        """Write the checkpoint of `step`, read it back, then prune; returns its folder.

        Returns once the data is on the disk. Raises StorageError (disk full, not writable) and
        CheckpointError (tied names, types that cannot be saved); the earlier ones are then intact.
        """
        target = self._checkpoints / f"step-{step:07d}"
        metadata = self.metadata | {"step": step} | _environment()
        needed = int(_ROOM * (tensor_bytes(model) + tensor_bytes(optimizer))) + 100_000
        known: dict[str, FileEntry] = {}
        with write_folder_atomically(
            target, metadata=metadata, needed_bytes=needed, known=known
        ) as folder:
            known[MODEL] = write_tensors(folder / MODEL, model)
            known[OPTIMIZER] = write_tensors(folder / OPTIMIZER, optimizer)
            _write_state(folder / STATE, state)
        verify_manifest(target)
        if best:
            self.mark_best(step)
        self._prune(step)
        return target

    def mark_best(self, step: int) -> None:
        """Point `best` at the checkpoint of `step`, atomically."""
        link = self.folder / f".tmp-best-{uuid.uuid4().hex}"
        with storage_errors(link):
            os.symlink(f"checkpoints/step-{step:07d}", link)
            os.replace(link, self.folder / "best")

    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending. By number: clocks go wrong, file times with them."""
        if not self._checkpoints.is_dir():
            return []
        found = (re.fullmatch(r"step-(\d+)", path.name) for path in self._checkpoints.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def latest_step(self) -> int | None:
        """The newest step with a checkpoint, unverified; None when there is none."""
        return max(self.steps(), default=None)

    def load_latest(self, device: str | torch.device = "cpu") -> Checkpoint | None:
        """The newest checkpoint that verifies; None when there is none at all.

        Each one passed over adds to `warnings`. Raises CheckpointError when all are damaged:
        starting again from nothing is not ours to decide.
        """
        if self._checkpoints.is_dir():
            sweep(self._checkpoints)
        problem = None
        for step in reversed(self.steps()):
            try:
                return self.load(self._checkpoints / f"step-{step:07d}", device)
            except CheckpointError as error:
                problem = error
                self.warnings.append(f"{error.message}; using an earlier checkpoint")
        if problem is not None:
            raise CheckpointError(
                f"no checkpoint in {self._checkpoints} can be used: {problem.message}",
                hint="move that folder away to start again",
            )
        return None

    def load_best(self, device: str | torch.device = "cpu") -> Checkpoint | None:
        """The checkpoint `best` points at; None when none was chosen. Never falls back."""
        best = self.folder / "best"
        return self.load(best, device) if best.is_symlink() or best.exists() else None

    def load(self, path: Path, device: str | torch.device = "cpu") -> Checkpoint:
        """Verify and read the checkpoint at `path`, and no other. Raises CheckpointError."""
        return load_checkpoint(path, device)

    def _prune(self, newest: int) -> None:
        """Keep the last `keep_last` up to `newest`, and the best.

        Later ones are not touched: they are what a run that was set back will write again.
        """
        stay = {
            f"step-{step:07d}"
            for step in [s for s in self.steps() if s <= newest][-self.keep_last :]
        }
        best = self.folder / "best"
        if best.is_symlink():
            stay.add(Path(os.readlink(best)).name)
        for step in self.steps():
            name = f"step-{step:07d}"
            if step < newest and name not in stay:
                remove_folder(self._checkpoints / name)


def load_checkpoint(path: Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Verify all of a checkpoint folder and read it. Raises CheckpointError naming the file."""
    folder = path.resolve()
    manifest = verify_manifest(folder)
    return Checkpoint(
        _step_of(folder, manifest),
        _copy(read_tensors(folder / MODEL, device)),
        _copy(read_tensors(folder / OPTIMIZER, device)),
        _read_state(folder / STATE),
        dict(manifest.metadata),
        folder,
    )


def load_checkpoint_state(path: Path) -> dict[str, Any]:
    """The training state alone, verified; no tensor is read. Raises CheckpointError."""
    folder = path.resolve()
    _step_of(folder, read_manifest(folder))
    verify_manifest(folder, only=[STATE])
    return _read_state(folder / STATE)


def _step_of(folder: Path, manifest: Manifest) -> int:
    for name in (MODEL, OPTIMIZER, STATE):
        if name not in manifest.files:
            raise CheckpointError(f"{folder} lists no `{name}`", hint="it is no checkpoint")
    step = manifest.metadata.get("step")
    if not isinstance(step, int):
        raise CheckpointError(f"{folder} does not say its step", hint="it is no checkpoint")
    return step


def load_model_tensors(
    folder: Path, *, verify: bool = True, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """The weights of one checkpoint alone, mapped into memory: pages are read as they are used.

    `verify=False` skips the hash (which reads the file once), not the format. Raises
    CheckpointError.
    """
    folder = folder.resolve()
    if verify:
        verify_manifest(folder, only=[MODEL])
    return read_tensors(folder / MODEL, device)


def _write_state(path: Path, state: Mapping[str, Json]) -> None:
    try:
        path.write_bytes(canonical_json(state))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the training state is not JSON: {error}", hint="pass it through `flatten_state`"
        ) from error


def _copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Optimizers adopt what they load: a view would hold the disk space of pruned checkpoints."""
    return {
        name: tensor.clone() if tensor.device.type == "cpu" else tensor
        for name, tensor in tensors.items()
    }


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return state


def _environment() -> dict[str, Json]:
    """What bitwise equal results also depend on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "safetensors": safetensors.__version__,
        "threads": torch.get_num_threads(),
    }
