"""What `pyper export` is asked for: options, and the model that they name."""

from dataclasses import dataclass
from pathlib import Path

import torch

from pyper.checkpoint import MANIFEST
from pyper.checkpoint import read_manifest as read_folder_manifest
from pyper.config.explain import nearest
from pyper.data import TextTokenizer
from pyper.data.chat_template import find_template
from pyper.errors import ConfigError, PyperError, UsageError
from pyper.mixture import LMRouter, Mixture, find_mixture
from pyper.nn import Transformer, count_parameters
from pyper.stages.export_facts import export_name
from pyper.stages.write import open_model

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MARK = "pyper_export"
"""In the manifest of an export: what may be overwritten."""


@dataclass(frozen=True)
class ExportOptions:
    """As typed."""

    to: str = "hf"
    expert: str | None = None
    mixing: str | None = None
    architecture: str = "auto"
    dtype: str | None = None
    shard_gb: float | None = None
    """5 where none is said."""
    license_name: str | None = None
    check: bool = True


@dataclass(frozen=True)
class Source:
    """What is exported."""

    path: Path
    mixture: Mixture
    """Of one, where one model is exported."""
    tokenizer: TextTokenizer
    chat_template: str | None
    name: str
    dtype: str
    """`fp32`, `fp16` or `bf16`."""

    @property
    def single(self) -> Transformer | None:
        """The only model, where there is one."""
        return self.mixture.expert(0) if self.mixture.n_experts == 1 else None

    @property
    def parameters(self) -> int:
        """Of all experts."""
        experts = range(self.mixture.n_experts)
        return sum(count_parameters(self.mixture.expert(e).config) for e in experts)

    @property
    def bytes(self) -> int:
        """Of the weights as they will be written."""
        return self.parameters * _DTYPES[self.dtype].itemsize


def open_source(path: Path, options: ExportOptions) -> Source:
    """The model on the CPU, in the type to be written. Raises what `open_model` raises."""
    opened = open_model(
        path, expert=options.expert, mixing=options.mixing, resident=None, device="cpu"
    )
    mixture = opened.mixture
    stored = {dtype: name for name, dtype in _DTYPES.items()}[mixture.expert(0).dtype]
    if options.dtype is not None and options.to == "hf":  # GGUF rounds matrices only
        for model in _models(mixture):
            model.to(_DTYPES[options.dtype])
    name = export_name(path, mixture.settings.experts[0] if options.expert else None)
    template = find_template(find_mixture(path))
    return Source(path, mixture, opened.tokenizer, template, name, options.dtype or stored)


def _models(mixture: Mixture) -> list[Transformer]:
    routers = mixture.router.models if isinstance(mixture.router, LMRouter) else []
    return [*(mixture.expert(e) for e in range(mixture.n_experts)), *routers]


def check_options(options: ExportOptions) -> None:
    """Raises ConfigError for a name that is not known, UsageError for a number out of range and
    for two options that exclude each other."""
    known = {
        "--to": (options.to, ("hf", "gguf")),
        "--architecture": (options.architecture, ("auto", "stock", "pyper")),
        "--dtype": (options.dtype or "fp32", tuple(_DTYPES)),
    }
    for option, (value, values) in known.items():
        if value not in values:
            raise ConfigError(f"`{option}` does not know `{value}`", hint=nearest(value, values))
    if options.to == "gguf" and options.architecture == "pyper":
        raise UsageError(
            "`--architecture pyper` is for transformers: a GGUF file has no modelling file",
            hint="leave one of `--architecture` and `--to gguf` out",
        )
    if options.to == "gguf" and options.shard_gb is not None:
        raise UsageError(
            "`--shard-gb` is for transformers: a GGUF file is one file",
            hint="leave one of `--shard-gb` and `--to gguf` out",
        )
    if options.shard_gb is not None and not 0 < options.shard_gb < float("inf"):
        raise UsageError(
            f"`--shard-gb` must be a finite number, more than 0, not {options.shard_gb:g}",
            hint="`5` is usual",
        )


def refuse_overwriting(output: Path) -> None:
    """An earlier export may be replaced, nothing else."""
    if output.is_file():
        raise ConfigError(f"`{output}` is a file", hint="choose another folder with `-o`")
    if not output.is_dir() or not any(output.iterdir()):
        return
    try:
        is_export = MARK in read_folder_manifest(output).metadata
    except PyperError:
        is_export = False
    if not is_export:
        raise ConfigError(
            f"`{output}` exists and is no export of Pyper (its {MANIFEST} does not say so)",
            hint="choose another folder with `-o`",
        )
