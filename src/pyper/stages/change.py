"""Add experts to a mixture, or drop some, without training anything."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyper.checkpoint import load_checkpoint, read_manifest, read_tensors
from pyper.config import ExpertConfig
from pyper.data import TextTokenizer
from pyper.data.chat_template import find_template
from pyper.errors import CheckpointError, ConfigError, TokenizerError, UsageError
from pyper.mixture import ExpertSource, MixtureSettings, find_mixture, save_mixture
from pyper.mixture.expert_folder import read_expert_config
from pyper.mixture.store import expert_folders, read_settings
from pyper.stages.assignment import read_assignment
from pyper.stages.folder import RunFolder


@dataclass(frozen=True)
class _Member:
    """One expert of the changed mixture."""

    name: str
    source: ExpertSource
    counts: Tensor | None


def change_mixture(
    path: Path, output: Path | None, drop: Sequence[str], add: Sequence[str]
) -> MixtureSettings:
    """Write a new mixture from an old one; the remaining experts stay bit for bit the same.

    Raises UsageError without an output, ConfigError, CheckpointError, TokenizerError (an expert of
    another tokenizer).
    """
    if output is None:
        raise UsageError(
            "`--drop` and `--add` write a new mixture", hint="say where: `-o mixtures/new`"
        )
    folder = find_mixture(path)
    refuse_overwriting(output)
    settings = read_settings(folder)
    tokenizer = TextTokenizer.load(folder / "tokenizer.json")
    members = _members(folder, settings)
    for name in drop:
        if name not in [m.name for m in members]:
            raise CheckpointError(
                f"the mixture has no expert `{name}`", hint=f"it has {', '.join(settings.experts)}"
            )
        members = [m for m in members if m.name != name]
    for text in add:
        member = _other_expert(text, tokenizer)
        if member.name in [m.name for m in members]:
            raise ConfigError(
                f"the mixture already has an expert `{member.name}`", hint="choose another name"
            )
        members.append(member)
    if not members:
        raise CheckpointError("a mixture needs at least one expert", hint="drop fewer")
    changed = settings.model_copy(
        update={
            "experts": tuple(m.name for m in members),
            "prices": (),  # prices belong to one set of experts
            "top_k": min(settings.top_k, len(members)),
        }
    )
    if settings.router == "lm":
        raise ConfigError(
            "mixtures routed by tiny language models cannot change their experts",
            hint='mix again with `--set mixture.router="unigram"`',
        )
    counts = [m.counts for m in members if m.counts is not None]
    save_mixture(
        output,
        changed,
        [m.source for m in members],
        tokenizer,
        counts=torch.stack(counts) if settings.router == "unigram" else None,
        chat_template=find_template(folder),
    )
    return changed


def refuse_overwriting(output: Path) -> None:
    """Another mixture may be replaced; data, runs and what a run made itself may not."""
    # a run file of the user's own may lie anywhere; a run has both
    if all((output.parent / name).is_file() for name in ("run.toml", "run.json")):
        raise ConfigError(
            f"{output} belongs to the run {output.parent}",
            hint="write it elsewhere: `-o models/new`",
        )
    is_mixture = (output / "config.json").is_file() and (output / "tokenizer.json").is_file()
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not is_mixture):
        raise ConfigError(
            f"`{output}` exists and is no mixture", hint="choose another folder with `-o`"
        )


def _members(folder: Path, settings: MixtureSettings) -> list[_Member]:
    counts: list[Tensor | None] = [None] * settings.n_experts
    if settings.router == "unigram":
        counts = list(read_tensors(folder / "router.safetensors")["counts"])
    members = []
    names = zip(settings.experts, expert_folders(settings), counts, strict=True)
    for name, where, row in names:
        config = read_expert_config(folder / where / "config.json")
        entry = read_manifest(folder).files[f"{where}/model.safetensors"]
        members.append(_Member(name, ExpertSource(config, folder / where, entry), row))
    return members


def _other_expert(text: str, tokenizer: TextTokenizer) -> _Member:
    """`NAME=RUN:EXPERT`, from a run on data of the same tokenizer."""
    name, equals, where = text.partition("=")
    root, colon, index = where.rpartition(":")
    if not (name and equals and colon and index.isdigit()):
        raise ConfigError(
            f"`--add {text}` is not of the form NAME=RUN:EXPERT",
            hint="for example `--add poems=runs/verse:2`",
        )
    run = RunFolder(Path(root))
    if not (run.expert(int(index)) / "best").exists():
        raise CheckpointError(
            f"`--add {text}`: {root} holds no trained expert {index}",
            hint="`pyper inspect` a run to see what is trained in it",
        )
    checkpoint = load_checkpoint(run.expert(int(index)) / "best")
    other = read_settings(find_mixture(run.root))
    if other.tokenizer_fingerprint != tokenizer.fingerprint:
        raise TokenizerError(
            f"`{name}` was trained with another tokenizer than the mixture",
            hint="prepare its data with this mixture's: `--tokenizer MIXTURE/tokenizer.json`",
        )
    config = ExpertConfig.model_validate(checkpoint.state["model_config"])
    counts = read_assignment(run.assignment).counts[int(index)]
    return _Member(name, ExpertSource(config, checkpoint.path), counts)
