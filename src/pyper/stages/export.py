"""Models for other programs: a folder for `transformers`, or a GGUF file for llama.cpp."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pyper.checkpoint import format_bytes, write_folder_atomically
from pyper.errors import ConfigError
from pyper.export import export_expert, export_tokenizer
from pyper.export.card import CardFacts, model_card
from pyper.export.families import family_of
from pyper.export.gguf_file import FileType, check_gguf, write_gguf
from pyper.export.gguf_model import gguf_architecture
from pyper.export.mixture_hf import export_mixture, export_single
from pyper.export.sparse_stock import export_stock, why_not_stock
from pyper.mixture import MixtureSettings
from pyper.nn import Transformer
from pyper.stages.export_check import check_exported, require_transformers, sample_text
from pyper.stages.export_facts import (
    domain_facts,
    evaluation_of,
    evaluation_of_expert,
    mixing_in_words,
    recipe_facts,
    run_around,
)
from pyper.stages.export_source import (
    MARK,
    ExportOptions,
    Source,
    check_options,
    open_source,
    refuse_overwriting,
)

_USUAL_SHARD_GB = 5.0
_FILE_TYPES: dict[str, FileType] = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}


def export_model(
    path: Path, output: Path, options: ExportOptions, console: Console
) -> dict[str, Any]:
    """Write `output`, whole or not at all, and check it; what was written.

    Raises ConfigError for options and for what the other side cannot be, MissingExtraError,
    CheckpointError when the check fails, StorageError.
    """
    check_options(options)
    refuse_overwriting(output)
    if options.check and options.to == "hf":
        require_transformers()
    source = open_source(path, options)
    write = _write_gguf if options.to == "gguf" else _write_hf
    with (
        console.status(f"writing {format_bytes(source.bytes)}") as status,
        write_folder_atomically(
            output, metadata={MARK: options.to}, needed_bytes=source.bytes
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
        if value != "":
            table.add_row(key.replace("_", " "), str(value).replace("[", "\\["))
    return table


def _write_hf(
    source: Source, folder: Path, options: ExportOptions, say: Callable[[str], None]
) -> dict[str, Any]:
    shard_gb = _USUAL_SHARD_GB if options.shard_gb is None else options.shard_gb
    shard_bytes = max(1, round(shard_gb * 1e9))
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
    source: Source, folder: Path, architecture: str, shard_bytes: int
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
        values["eos_token_id"] = list(dict.fromkeys((settings.bos_id, *settings.stop_ids)))
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
    source: Source, folder: Path, options: ExportOptions, say: Callable[[str], None]
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
    notes = [] if note is None else [note]
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
    source: Source,
    folder: Path,
    options: ExportOptions,
    architecture: str,
    notes: list[str],
    *,
    needs_code: bool = False,
    gguf_file: str | None = None,
) -> None:
    mixture, run = source.mixture, run_around(source.path.resolve())
    config, several = mixture.expert(0).config, mixture.n_experts > 1
    evaluation = evaluation_of(run)
    expert = None if options.expert is None else mixture.settings.experts[0]
    recipe = recipe_facts(run, evaluation, expert)
    if expert is not None:
        evaluation = evaluation_of_expert(evaluation, expert)
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
        is_one_of_several=expert is not None and recipe.get("experts", 1) > 1,
        recipe=recipe,
        evaluation=evaluation,
        notes=notes,
    )
    (folder / "README.md").write_text(model_card(facts), encoding="utf-8")
