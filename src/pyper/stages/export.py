"""Models for other programs: a folder for `transformers`, or a GGUF file for llama.cpp."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pyper.checkpoint import MANIFEST, format_bytes, write_folder_atomically
from pyper.checkpoint import read_manifest as read_folder_manifest
from pyper.config.load import nearest
from pyper.data import TextTokenizer
from pyper.data.chat_template import find_template
from pyper.errors import ConfigError, PyperError
from pyper.export import export_expert, export_tokenizer
from pyper.export.card import CardFacts, model_card
from pyper.export.families import family_of
from pyper.export.gguf_file import FileType, check_gguf, write_gguf
from pyper.export.gguf_model import gguf_architecture
from pyper.export.mixture_hf import export_mixture, export_single
from pyper.export.sparse_stock import export_stock, why_not_stock
from pyper.mixture import LMRouter, Mixture, MixtureSettings, find_mixture
from pyper.nn import Transformer, count_parameters
from pyper.stages.export_check import check_exported, require_transformers, sample_text
from pyper.stages.export_facts import (
    domain_facts,
    evaluation_of,
    evaluation_of_expert,
    export_name,
    mixing_in_words,
    recipe_facts,
    run_around,
)
from pyper.stages.write import open_model

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_FILE_TYPES: dict[str, FileType] = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
_MARK = "pyper_export"  # in the manifest: what may be overwritten


@dataclass(frozen=True)
class ExportOptions:
    """As typed."""

    to: str = "hf"
    expert: str | None = None
    mixing: str | None = None
    architecture: str = "auto"
    dtype: str | None = None
    shard_gb: float = 5.0
    license_name: str | None = None
    check: bool = True


@dataclass(frozen=True)
class _Source:
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


def export_model(
    path: Path, output: Path, options: ExportOptions, console: Console
) -> dict[str, Any]:
    """Write `output`, whole or not at all, and check it; what was written.

    Raises ConfigError for options and for what the other side cannot be, MissingExtraError,
    CheckpointError when the check fails, StorageError.
    """
    _check_options(options)
    _refuse_overwriting(output)
    if options.check and options.to == "hf":
        require_transformers()
    source = _open(path, options)
    needed = source.parameters * _DTYPES[source.dtype].itemsize
    write = _write_gguf if options.to == "gguf" else _write_hf
    with (
        console.status(f"writing {format_bytes(needed)}") as status,
        write_folder_atomically(
            output, metadata={_MARK: options.to}, needed_bytes=needed
        ) as folder,
    ):
        return {"path": str(output), "to": options.to, "parameters": source.parameters} | write(
            source, folder, options, lambda text: status.update(text)
        )


def export_table(result: dict[str, Any]) -> Table:
    """For people."""
    table = Table(show_header=False, box=None)
    for key, value in result.items():
        if isinstance(value, float):
            value = f"{value:.1e}"
        elif isinstance(value, list):
            value = "\n".join(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        table.add_row(key.replace("_", " "), str(value).replace("[", "\\["))
    return table


def _write_hf(
    source: _Source, folder: Path, options: ExportOptions, say: Callable[[str], None]
) -> dict[str, Any]:
    shard_bytes = max(1, round(options.shard_gb * 1e9))
    architecture, note = _write_weights(source, folder, options.architecture, shard_bytes)
    needs_code = architecture.startswith("Pyper")
    settings = source.mixture.settings
    _write_stop_ids(folder / "generation_config.json", settings)
    export_tokenizer(
        source.tokenizer,
        folder,
        seq_len=settings.seq_len,
        chat_template=source.chat_template,
    )
    notes = [] if note is None else [note]
    _write_card(source, folder, options, architecture, notes, needs_code=needs_code)
    result: dict[str, Any] = {
        "architecture": architecture,
        "dtype": source.dtype,
        "trust_remote_code": needs_code,
        "notes": notes,
    }
    if options.check:
        say("loading it with transformers")
        result |= check_exported(folder, source.mixture, source.tokenizer, sample_text())
    return result


def _write_weights(
    source: _Source, folder: Path, architecture: str, shard_bytes: int
) -> tuple[str, str | None]:
    """The architecture's name, and why it is none of the stock ones where one was looked for."""
    model = source.single
    if model is None:
        if architecture == "stock":
            raise ConfigError(
                "a mixture of several experts has no stock architecture",
                hint="export one of them: `--expert NAME`, or the mixture: `--architecture pyper`",
            )
        return export_mixture(source.mixture, folder, shard_bytes=shard_bytes), None
    stock, reason = _stock_of(model)
    if architecture != "pyper" and (reason is None or architecture == "stock"):
        return stock(model, folder, shard_bytes=shard_bytes), None
    note = None if reason is None else f"It has a modelling file of its own: {reason}."
    return export_single(model, folder, shard_bytes=shard_bytes), note


def _write_stop_ids(file: Path, settings: MixtureSettings) -> None:
    """A model that came from elsewhere may end its texts with more than the document token."""
    if settings.stop_ids:
        values = json.loads(file.read_text(encoding="utf-8"))
        values["eos_token_id"] = [settings.bos_id, *settings.stop_ids]
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _stock_of(model: Transformer) -> tuple[Callable[..., str], str | None]:
    """What writes it as a stock architecture, and why none is exactly the model."""
    if model.config.kind != "dense":
        return export_stock, why_not_stock(model)
    try:
        family_of(model.config)
    except ConfigError as error:
        return export_expert, error.message
    return export_expert, None


def _write_gguf(
    source: _Source, folder: Path, options: ExportOptions, say: Callable[[str], None]
) -> dict[str, Any]:
    model = source.single
    if model is None:
        raise ConfigError(
            f"a GGUF file holds one model, this is a mixture of {source.mixture.n_experts}",
            hint=f"export one of them: `--expert {source.mixture.settings.experts[0]}`",
        )
    file_type: FileType = _FILE_TYPES[source.dtype]
    file = f"{source.name}-{file_type}.gguf"
    note = write_gguf(
        model,
        source.tokenizer,
        folder / file,
        name=source.name,
        file_type=file_type,
        license_name=options.license_name,
        chat_template=source.chat_template,
        stop_ids=source.mixture.settings.stop_ids,
    )
    architecture = gguf_architecture(model.config)
    notes = [] if note is None else [note[0].upper() + note[1:] + "."]
    _write_card(source, folder, options, architecture, notes, gguf_file=file)
    result: dict[str, Any] = {
        "architecture": architecture,
        "dtype": source.dtype,
        "file": file,
        "notes": notes,
    }
    if options.check:
        say("reading it again")
        result["tensors_equal"] = check_gguf(folder / file, model, file_type)
    return result


def _write_card(
    source: _Source,
    folder: Path,
    options: ExportOptions,
    architecture: str,
    notes: list[str],
    *,
    needs_code: bool = False,
    gguf_file: str | None = None,
) -> None:
    mixture, run = source.mixture, run_around(source.path)
    config, several = mixture.expert(0).config, mixture.n_experts > 1
    evaluation = evaluation_of(run)
    recipe = recipe_facts(run, evaluation)
    if options.expert is not None:
        evaluation = evaluation_of_expert(evaluation, mixture.settings.experts[0])
    kind = "a sparse" if config.kind == "sparse" else "one dense"
    facts = CardFacts(
        name=source.name,
        kind=f"a mixture of {mixture.n_experts} language models"
        if several
        else f"{kind} language model",
        architecture=architecture,
        parameters=source.parameters,
        seq_len=mixture.settings.seq_len,
        vocab_size=config.vocab_size,
        dtype=source.dtype,
        mixing=mixing_in_words(mixture.settings) if several else "",
        gguf_file=gguf_file,
        needs_code=needs_code,
        has_chat_template=source.chat_template is not None,
        license_name=options.license_name,
        domains=domain_facts(run),
        recipe=recipe,
        evaluation=evaluation,
        notes=notes,
    )
    (folder / "README.md").write_text(model_card(facts), encoding="utf-8")


def _open(path: Path, options: ExportOptions) -> _Source:
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
    return _Source(path, mixture, opened.tokenizer, template, name, options.dtype or stored)


def _models(mixture: Mixture) -> list[Transformer]:
    routers = mixture.router.models if isinstance(mixture.router, LMRouter) else []
    return [*(mixture.expert(e) for e in range(mixture.n_experts)), *routers]


def _check_options(options: ExportOptions) -> None:
    known = {
        "--to": (options.to, ("hf", "gguf")),
        "--architecture": (options.architecture, ("auto", "stock", "pyper")),
        "--dtype": (options.dtype or "fp32", tuple(_DTYPES)),
    }
    for option, (value, values) in known.items():
        if value not in values:
            raise ConfigError(f"`{option}` does not know `{value}`", hint=nearest(value, values))
    if not 0 < options.shard_gb < float("inf"):
        raise ConfigError(
            f"`--shard-gb` must be more than 0, not {options.shard_gb}", hint="`5` is usual"
        )


def _refuse_overwriting(output: Path) -> None:
    """An earlier export may be replaced, nothing else."""
    if output.is_file():
        raise ConfigError(f"`{output}` is a file", hint="choose another folder with `-o`")
    if not output.is_dir() or not any(output.iterdir()):
        return
    try:
        is_export = _MARK in read_folder_manifest(output).metadata
    except PyperError:
        is_export = False
    if not is_export:
        raise ConfigError(
            f"`{output}` exists and is no export of Pyper (its {MANIFEST} does not say so)",
            hint="choose another folder with `-o`",
        )
