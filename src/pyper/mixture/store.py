"""The mixture's folder: settings, tokenizer, router, experts, all under one manifest.

mixture/
  config.json           MixtureSettings
  tokenizer.json
  router.safetensors    token counts (E, V); or router/00 … for tiny language models
  experts/00-law/       config.json, model.safetensors
  MANIFEST.json
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from pyper.checkpoint import (
    FileEntry,
    Json,
    read_manifest,
    read_tensors,
    verify_manifest,
    write_folder_atomically,
    write_tensors,
)
from pyper.config import ExpertConfig
from pyper.config.explain import explain
from pyper.data import TextTokenizer
from pyper.errors import CheckpointError, TokenizerError
from pyper.mixture.expert_folder import load_expert, model_tensors
from pyper.mixture.mixture import Mixture
from pyper.mixture.router import LMRouter, PrefixRouter, UnigramRouter
from pyper.mixture.settings import MixtureSettings
from pyper.nn import Transformer

_WEIGHTS, _CONFIG = "model.safetensors", "config.json"


@dataclass(frozen=True)
class ExpertSource:
    """Where an expert's weights are: a checkpoint folder, or another mixture's expert."""

    config: ExpertConfig
    folder: Path
    entry: FileEntry | None = None
    """Size and hash of the weights; default: from the folder's own manifest."""


def save_mixture(
    target: Path,
    settings: MixtureSettings,
    sources: Sequence[ExpertSource],
    tokenizer: TextTokenizer,
    *,
    counts: Tensor | None = None,
    router_models: Sequence[Transformer] = (),
    metadata: Mapping[str, Json] | None = None,
    chat_template: str | None = None,
) -> None:
    """Write a mixture, completely or not at all; weights are hard links where the disk allows.

    counts: (E, V), for `router = "unigram"`. chat_template: kept beside the tokenizer. Raises
    StorageError, TokenizerError for experts of different vocabularies.
    """
    _check_same_vocabulary(settings, sources, tokenizer)
    known: dict[str, FileEntry] = {}
    target.parent.mkdir(parents=True, exist_ok=True)
    with write_folder_atomically(target, metadata=metadata, known=known) as folder:
        (folder / _CONFIG).write_text(settings.model_dump_json(indent=1) + "\n")
        tokenizer.save(folder / "tokenizer.json")
        if chat_template is not None:
            (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        for name, source in zip(expert_folders(settings), sources, strict=True):
            (folder / name).mkdir(parents=True)
            (folder / name / _CONFIG).write_text(source.config.model_dump_json(indent=1) + "\n")
            known[f"{name}/{_WEIGHTS}"] = _link(source, folder / name / _WEIGHTS)
        if counts is not None:
            write_tensors(folder / "router.safetensors", {"counts": counts})
        for index, model in enumerate(router_models):
            part = folder / "router" / f"{index:02d}"
            part.mkdir(parents=True)
            (part / _CONFIG).write_text(model.config.model_dump_json(indent=1) + "\n")
            write_tensors(part / _WEIGHTS, model_tensors(model))


def expert_folders(settings: MixtureSettings) -> list[str]:
    """`experts/00-law` …, relative to the mixture."""
    return [f"experts/{i:02d}-{_slug(name)}" for i, name in enumerate(settings.experts)]


def load_mixture(
    path: Path, *, device: str | torch.device = "cpu", resident: int | None = None
) -> tuple[Mixture, TextTokenizer]:
    """Open a mixture; experts are verified and loaded when they are first used.

    `resident` bounds how many stay in memory. Raises CheckpointError, TokenizerError.
    """
    folder = find_mixture(path)
    manifest = read_manifest(folder)
    experts = {name for name in manifest.files if name.startswith("experts/")}
    verify_manifest(folder, only=manifest.files.keys() - experts)
    settings = read_settings(folder)
    tokenizer = TextTokenizer.load(folder / "tokenizer.json")
    if tokenizer.fingerprint != settings.tokenizer_fingerprint:
        raise TokenizerError(
            f"{folder / 'tokenizer.json'} is not the tokenizer of this mixture",
            hint="copy the mixture again, or `pyper mix` again",
        )
    loaders = [
        _VerifiedExpert(folder, name, torch.device(device)) for name in expert_folders(settings)
    ]
    router = _load_router(folder, settings, torch.device(device))
    return Mixture(settings, loaders, router, resident=resident), tokenizer


def find_mixture(path: Path) -> Path:
    """The mixture in a run folder, or the folder itself. Raises CheckpointError."""
    for folder in (path / "mixture", path):
        if (folder / _CONFIG).is_file() and (folder / "tokenizer.json").is_file():
            return folder
    if (path / "run.toml").is_file():
        raise CheckpointError(
            f"the run {path} has no mixture yet", hint=f"finish it: `pyper train {path}`"
        )
    raise CheckpointError(
        f"{path} is neither a run nor a mixture", hint="pass e.g. `runs/quickstart`"
    )


def read_settings(folder: Path) -> MixtureSettings:
    """`config.json` of a mixture. Raises CheckpointError."""
    try:
        return MixtureSettings.model_validate(json.loads((folder / _CONFIG).read_text()))
    except (OSError, ValueError, ValidationError, RecursionError) as error:
        why = str(error)
        if isinstance(error, ValidationError):
            why = explain(MixtureSettings, error, "").message
        raise CheckpointError(
            f"{folder / _CONFIG} is not the configuration of a mixture: {why}",
            hint="`pyper mix` the run again",
        ) from None


@dataclass
class _VerifiedExpert:
    """Loads an expert of a mixture; its hashes are checked the first time."""

    folder: Path
    name: str
    device: torch.device
    verified: bool = False

    def __call__(self) -> Transformer:
        if not self.verified:
            files = [f"{self.name}/{_CONFIG}", f"{self.name}/{_WEIGHTS}"]
            verify_manifest(self.folder, only=files)
            self.verified = True
        return load_expert(self.folder / self.name, device=self.device, verify=False)


def _load_router(
    folder: Path, settings: MixtureSettings, device: torch.device
) -> PrefixRouter | None:
    if settings.router == "unigram":
        return UnigramRouter(read_tensors(folder / "router.safetensors")["counts"])
    if settings.router == "lm":
        parts = [folder / "router" / f"{i:02d}" for i in range(settings.n_experts)]
        return LMRouter([load_expert(part, device=device, verify=False) for part in parts])
    return None


def _check_same_vocabulary(
    settings: MixtureSettings, sources: Sequence[ExpertSource], tokenizer: TextTokenizer
) -> None:
    # Tables may have more rows than there are tokens: many published models are padded.
    n_rows = max(sources[0].config.vocab_size, tokenizer.vocab_size)
    for name, source in zip(settings.experts, sources, strict=True):
        if source.config.vocab_size != n_rows:
            raise TokenizerError(
                f"expert `{name}` has a vocabulary of {source.config.vocab_size:,}, "
                f"the mixture's tokenizer or first expert {n_rows:,}",
                hint="all experts of a mixture share one tokenizer: train it on the same data",
            )


def _link(source: ExpertSource, target: Path) -> FileEntry:
    """A hard link (or a copy), and the entry of the manifest that vouches for the source."""
    weights = source.folder / _WEIGHTS
    entry = source.entry or read_manifest(source.folder).files[_WEIGHTS]
    try:
        os.link(weights, target)
    except OSError:
        shutil.copyfile(weights, target)
    return entry


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name) or "expert"
