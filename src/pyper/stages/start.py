"""A saved model to train on from, and what it brings along."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pyper.checkpoint import load_checkpoint_state, load_model_tensors, verify_manifest
from pyper.config import ExpertConfig, RunConfig, parse_run, read_toml
from pyper.data.chat_template import find_template
from pyper.errors import CheckpointError, ConfigError, TokenizerError
from pyper.mixture.expert_folder import build_expert, read_expert_config
from pyper.mixture.store import expert_folders, find_mixture, read_settings
from pyper.stages.folder import read_json

_TABLE = "embedding.weight"
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Start:
    """A shape, and its weights (read and verified when they are asked for)."""

    config: ExpertConfig
    load: Callable[[], dict[str, Tensor]]
    file: Path
    """Of the weights."""
    tokenizer: str | None
    """Its fingerprint. None: a checkpoint far from its run; only the size of the vocabulary can be
    compared."""

    @property
    def tokenizer_is_known(self) -> bool:
        """Whether fingerprints can be compared."""
        return self.tokenizer is not None


def open_start(
    path: Path, tokenizer_fingerprint: str | None, asked_by: str = "train.start_from"
) -> Start:
    """The model of `train.start_from`: a checkpoint, a mixture of one, or one of its experts.

    tokenizer_fingerprint: of the data; None does not compare it. asked_by: the option that errors
    name. Raises CheckpointError for anything else, ConfigError for a mixture of several,
    TokenizerError when its tokenizer is not that of the data.
    """
    if not path.exists():
        raise CheckpointError(
            f"`{asked_by}`: there is no {path}",
            hint="pass what `pyper merge -o` or `pyper import -o` wrote",
        )
    if (path / "state.json").is_file():
        config = ExpertConfig.model_validate(load_checkpoint_state(path)["model_config"])
        own, file = _tokenizer_of_run(path)
        _check_tokenizer(path, own, tokenizer_fingerprint, file)
        load = partial(_load_checkpoint, path)
        return Start(config, load, path / _WEIGHTS, own)
    mixture, name = _find_expert(path, asked_by)
    own = read_settings(mixture).tokenizer_fingerprint
    _check_tokenizer(path, own, tokenizer_fingerprint, mixture / "tokenizer.json")
    config = read_expert_config(mixture / name / "config.json")
    return Start(config, partial(_load, mixture, name), mixture / name / _WEIGHTS, own)


@dataclass(frozen=True)
class CheckedStart:
    """Weights of `train.start_from` that were read, verified and found to fit."""

    tensors: dict[str, Tensor]
    """Views of the mapped file."""
    file: Path
    stamp: tuple[int, ...]
    """How the file was before it was read."""

    @property
    def is_unchanged(self) -> bool:
        """Whether the file is still the one that was verified, by its identity, size and time."""
        return _stamp(self.file) == self.stamp


def start_tensors(
    path: Path, tokenizer_fingerprint: str | None, checked: CheckedStart | None
) -> dict[str, Tensor]:
    """The weights of `train.start_from`: those that were checked, where they are still the same.

    Else they are read and verified. Raises what `open_start` raises, and CheckpointError.
    """
    if checked is not None and checked.is_unchanged:
        return checked.tensors
    return open_start(path, tokenizer_fingerprint).load()


def check_start(path: Path) -> CheckedStart:
    """Read the weights of `train.start_from` and see that they fit their shape.

    Raises what `open_start` raises, and CheckpointError where they are damaged or others.
    """
    start = open_start(path, None)
    stamp = _stamp(start.file)
    tensors = start.load()
    hint = "copy it again, whole, from where it was made"
    if _TABLE not in tensors:
        raise CheckpointError(f"`train.start_from`: {path} has no `{_TABLE}`", hint=hint)
    try:
        build_expert(start.config, tensors, device=torch.device("cpu"), keep=True)
    except CheckpointError as error:
        raise CheckpointError(f"`train.start_from`: {path}: {error.message}", hint=hint) from None
    return CheckedStart(tensors, start.file, stamp)


def _stamp(file: Path) -> tuple[int, ...]:
    """Empty where there is no file: loading says so."""
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class Brought:
    """What a model that came from elsewhere knows about chats."""

    chat_template: str | None = None
    stop_ids: tuple[int, ...] = ()


def brought_along(run: RunConfig) -> Brought:
    """Of the model that a run starts from, and nothing without one; data may have a template too,
    which comes first. Raises ConfigError, CheckpointError."""
    start, own = run.train.start_from, find_template(run.data.path)
    brought = _brought_by(start) if start is not None and start.exists() else Brought()
    return Brought(own or brought.chat_template, brought.stop_ids)


def _brought_by(path: Path) -> Brought:
    """A checkpoint inside a run has what its run has, or what that one started from."""
    if not (path / "state.json").is_file():
        mixture, _ = _find_expert(path)
        return _brought_by_mixture(mixture)
    for folder in path.resolve().parents:
        if (folder / "mixture" / "config.json").is_file():
            return _brought_by_mixture(folder / "mixture")
        if (folder / "run.toml").is_file():
            return brought_along(parse_run(read_toml(folder / "run.toml")))
    return Brought()


def _brought_by_mixture(mixture: Path) -> Brought:
    return Brought(find_template(mixture), read_settings(mixture).stop_ids)


def _tokenizer_of_run(checkpoint: Path) -> tuple[str | None, Path | None]:
    """The tokenizer's fingerprint of the run that a checkpoint is in, and its file if it is there.

    None where the checkpoint was copied out of its run, or the run is from an older version.
    """
    for folder in checkpoint.resolve().parents:
        if (folder / "run.json").is_file():
            file = folder / "mixture" / "tokenizer.json"
            own = (read_json(folder / "run.json") or {}).get("tokenizer")
            if own is None and file.is_file():
                own = read_settings(file.parent).tokenizer_fingerprint
            return own, file if file.is_file() else None
    return None, None


def _check_tokenizer(
    path: Path, own: str | None, of_data: str | None, tokenizer: Path | None
) -> None:
    if None in (own, of_data) or own == of_data:
        return
    where = tokenizer or "the tokenizer.json of the data that it was trained on"
    raise TokenizerError(
        f"`train.start_from`: {path} was trained with another tokenizer than the data were "
        "prepared with: the same ids mean other words",
        hint=f"prepare them with `--tokenizer {where}`",
    )


def _find_expert(path: Path, asked_by: str = "train.start_from") -> tuple[Path, str]:
    """The mixture, and the name of the expert's folder in it."""
    around = path.parent.parent
    if path.parent.name == "experts" and (around / "tokenizer.json").is_file():
        return around, f"experts/{path.name}"
    mixture = find_mixture(path)
    folders = expert_folders(read_settings(mixture))
    if len(folders) != 1:
        raise ConfigError(
            f"`{asked_by}`: {path} is a mixture of {len(folders)} experts, not one model",
            hint=f"name one of them, e.g. `{mixture / folders[0]}`, or `pyper merge` them",
        )
    return mixture, folders[0]


def _load_checkpoint(path: Path) -> dict[str, Tensor]:
    verify_manifest(path.resolve())
    return load_model_tensors(path, verify=False)


def _load(mixture: Path, name: str) -> dict[str, Tensor]:
    verify_manifest(mixture, only=[f"{name}/config.json", f"{name}/{_WEIGHTS}"])
    return load_model_tensors(mixture / name, verify=False)
