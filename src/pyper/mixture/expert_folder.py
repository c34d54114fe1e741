"""One expert on disk: `config.json` and `model.safetensors`."""

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch.nn import init
from torch.overrides import TorchFunctionMode

from pyper.checkpoint import load_model_tensors
from pyper.config import ExpertConfig
from pyper.errors import CheckpointError
from pyper.nn import Transformer


def model_tensors(model: Transformer) -> dict[str, torch.Tensor]:
    """The weights by name, a tied head left out (the input table is the same matrix)."""
    tied = {"head.weight"} if model.config.tie_embeddings else set()
    return {name: t for name, t in model.state_dict().items() if name not in tied}


def load_tensors_into(
    model: Transformer, tensors: dict[str, torch.Tensor], *, keep: bool = False
) -> None:
    """The inverse of `model_tensors`. Raises CheckpointError when names or shapes differ.

    keep: the model takes over the tensors themselves, which may be views of a mapped file: then
    an expert is in memory once, and only as far as it was used.
    """
    hint = "the checkpoint was made with another `[model]`; use another run folder"
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False, assign=keep)
    except RuntimeError as error:
        line = str(error).splitlines()[1].strip()
        raise CheckpointError(f"the weights do not fit the model: {line}", hint=hint) from None
    tied = {"head.weight"} if model.config.tie_embeddings else set()
    if wrong := [*unexpected, *(name for name in missing if name not in tied)]:
        raise CheckpointError(
            f"the checkpoint and the model differ in their weights, e.g. `{wrong[0]}`", hint=hint
        )


def read_expert_config(file: Path) -> ExpertConfig:
    """The shape of a saved expert. Raises CheckpointError for anything else."""
    try:
        return ExpertConfig.model_validate(json.loads(file.read_text()))
    except (OSError, ValueError, ValidationError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is not the configuration of an expert: {error}",
            hint="train again, or copy the folder again from where it came",
        ) from None


def build_expert(
    config: ExpertConfig,
    tensors: dict[str, torch.Tensor],
    *,
    device: torch.device,
    keep: bool = False,
) -> Transformer:
    """A model of these weights, without first drawing random ones; in evaluation mode.

    keep: see `load_tensors_into`; the tensors must be on the device. Raises CheckpointError where
    they are not this shape's, before anything of its size is made.
    """
    model = _without_weights(config, sum(tensor.numel() for tensor in tensors.values()))
    if config.tie_embeddings:  # to_empty would give the shared matrix two homes
        model.head.register_parameter("weight", None)
    dtype = tensors["embedding.weight"].dtype
    model = model.to(dtype).to_empty(device=device)
    load_tensors_into(model, tensors, keep=keep)
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight
    return model.eval()


def _without_weights(config: ExpertConfig, n_held: int) -> Transformer:
    """On the meta device. Raises CheckpointError where `n_held` weights are far too few for it."""
    wrong = CheckpointError(
        f"the weights do not fit the model: {n_held:,} are far too few for its `config.json`",
        hint="copy the folder again from where it came",
    )
    # Each layer takes time to make, if no room.
    if max(config.n_layers, config.vocab_size * config.d_model) > n_held:
        raise wrong
    try:
        with torch.device("meta"), _NoRandomNumbers():
            model = Transformer(config)
    except (RuntimeError, TypeError) as error:  # sizes beyond 64 bits
        raise wrong from error
    if sum(parameter.numel() for parameter in model.parameters()) > 2 * n_held:
        raise wrong
    return model


class _NoRandomNumbers(TorchFunctionMode):
    """Initial weights are not drawn: on the meta device that would load torch's compiler first,
    which takes longer than all the rest."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (init.normal_, init.uniform_, init.kaiming_uniform_):
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def load_expert(folder: Path, *, device: torch.device, verify: bool = True) -> Transformer:
    """The expert in a folder; its hashes are checked first where the folder has a manifest."""
    config = read_expert_config(folder / "config.json")
    tensors = load_model_tensors(folder, verify=verify)
    return build_expert(config, tensors, device=device, keep=device.type == "cpu")
