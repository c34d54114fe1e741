"""A saved model to train on from."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from pyper.checkpoint import load_checkpoint, load_model_tensors, verify_manifest
from pyper.config import ExpertConfig
from pyper.errors import CheckpointError, ConfigError, TokenizerError
from pyper.mixture.expert_folder import read_expert_config
from pyper.mixture.store import expert_folders, find_mixture, read_settings


@dataclass(frozen=True)
class Start:
    """A shape, and its weights (read and verified when they are asked for)."""

    config: ExpertConfig
    load: Callable[[], dict[str, Tensor]]


def open_start(path: Path, tokenizer_fingerprint: str | None) -> Start:
    """The model of `train.start_from`: a checkpoint, a mixture of one, or one of its experts.

    tokenizer_fingerprint: of the data; None does not compare it. Raises CheckpointError for
    anything else, ConfigError for a mixture of several, TokenizerError
    when its tokenizer is not that of the data.
    """
    if not path.exists():
        raise CheckpointError(
            f"`train.start_from`: there is no {path}", hint="pass what `pyper merge -o` wrote"
        )
    if (path / "state.json").is_file():
        state = load_checkpoint(path).state
        config = ExpertConfig.model_validate(state["model_config"])
        return Start(config, partial(load_model_tensors, path))
    mixture, name = _find_expert(path)
    own = read_settings(mixture).tokenizer_fingerprint
    if tokenizer_fingerprint not in (None, own):
        raise TokenizerError(
            f"{path} was trained with another tokenizer than the data were prepared with",
            hint=f"prepare them with `--tokenizer {mixture / 'tokenizer.json'}`",
        )
    return Start(read_expert_config(mixture / name / "config.json"), partial(_load, mixture, name))


def _find_expert(path: Path) -> tuple[Path, str]:
    """The mixture, and the name of the expert's folder in it."""
    around = path.parent.parent
    if path.parent.name == "experts" and (around / "tokenizer.json").is_file():
        return around, f"experts/{path.name}"
    mixture = find_mixture(path)
    folders = expert_folders(read_settings(mixture))
    if len(folders) != 1:
        raise ConfigError(
            f"`train.start_from`: {path} is a mixture of {len(folders)} experts, not one model",
            hint=f"name one of them, e.g. `{mixture / folders[0]}`, or `pyper merge` them",
        )
    return mixture, folders[0]


def _load(mixture: Path, name: str) -> dict[str, Tensor]:
    verify_manifest(mixture, only=[f"{name}/config.json", f"{name}/model.safetensors"])
    return load_model_tensors(mixture / name, verify=False)
