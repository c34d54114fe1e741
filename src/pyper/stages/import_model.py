"""A checkpoint of `transformers` as a model of Pyper: a mixture of one, which all else opens."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from pyper.checkpoint import format_bytes
from pyper.config import ExpertConfig
from pyper.config.explain import nearest
from pyper.data.chat_template import find_template
from pyper.errors import CheckpointError, ConfigError, MissingExtraError
from pyper.export.import_config import ForeignConfig, read_config
from pyper.export.import_files import read_object, read_optional
from pyper.export.import_tokenizer import (
    ForeignTokenizer,
    check_rows,
    read_tokenizer,
    stop_ids,
)
from pyper.export.import_weights import ForeignWeights
from pyper.mixture import MixtureSettings, build_expert
from pyper.nn import Transformer
from pyper.stages.change import refuse_overwriting
from pyper.stages.merge import save_single
from pyper.stages.write import visible

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_CHECKED_TOKENS = 48
# Both sides in float32: they differ by the order of sums, and more is another model.
_MOST_DIFFERENCE = 1e-3


@dataclass(frozen=True)
class ImportOptions:
    """As typed."""

    dtype: str = "keep"
    """Or `bf16`, `fp16`, `fp32`."""
    bos: str | None = None
    ignored_keys: tuple[str, ...] = ()
    check: bool = False


def import_model(
    source: Path, output: Path, options: ImportOptions, console: Console
) -> dict[str, Any]:
    """Write the model in the folder `source` as a mixture of one; what it is.

    Raises CheckpointError, ConfigError and TokenizerError naming what cannot be taken over, and
    CheckpointError where the check finds a difference.
    """
    _check_folders(source, output)
    dtype = _dtype_of(options.dtype)
    opened = _open(source, options)
    tensors = _read(
        opened.weights, opened.config, opened.weights.dtype(dtype, opened.values), console
    )
    model = build_expert(opened.config, tensors, device=torch.device("cpu"), keep=True)
    settings = _settings(source, opened)
    template = find_template(source)
    result = _facts(output, opened, model, settings) | {"chat_template": bool(template)}
    if options.check:  # before anything is written: what differs must not be used
        result["check"] = {"largest_logit_difference": compare_logits(source, model)}
    save_single(output, model, settings, opened.tokenizer.tokenizer, template)
    return result


@dataclass(frozen=True)
class _Opened:
    """A folder whose parts fit together."""

    values: dict[str, Any]
    foreign: ForeignConfig
    weights: ForeignWeights
    tokenizer: ForeignTokenizer

    @property
    def config(self) -> ExpertConfig:
        """With the token that begins documents."""
        bos_id = self.tokenizer.tokenizer.bos_id
        return self.foreign.expert.model_copy(update={"bos_id": bos_id})


def _open(source: Path, options: ImportOptions) -> _Opened:
    values = read_object(source / "config.json")
    foreign = read_config(values, options.ignored_keys)
    weights = ForeignWeights(source)
    weights.check(foreign.expert)
    beside = read_optional(source / "tokenizer_config.json")
    tokenizer = read_tokenizer(source, values, beside, options.bos)
    check_rows(tokenizer.tokenizer, foreign.expert.vocab_size)
    return _Opened(values, foreign, weights, tokenizer)


def _settings(source: Path, opened: _Opened) -> MixtureSettings:
    generation = read_optional(source / "generation_config.json")
    return MixtureSettings(
        experts=(source.resolve().name,),
        tokenizer_fingerprint=opened.tokenizer.tokenizer.fingerprint,
        bos_id=opened.config.bos_id,
        stop_ids=stop_ids(opened.values, generation, opened.config.vocab_size),
        seq_len=opened.config.seq_len,
        router="experts",
        top_k=1,
    )


def _check_folders(source: Path, output: Path) -> None:
    refuse_overwriting(output)
    if output.resolve() == source.resolve():
        raise ConfigError(f"{source} would be overwritten", hint="write elsewhere: `-o seeds/new`")
    if (source / "config.json").is_file():
        return
    if not source.exists():
        raise CheckpointError(
            f"there is no folder {source}",
            hint="download a model first: `hf download ORG/NAME --local-dir FOLDER`",
        )
    if source.is_file():
        raise CheckpointError(
            f"{source} is a file", hint=f"pass the folder it is in: `{source.parent}`"
        )
    raise CheckpointError(
        f"{source} has no config.json: it is no checkpoint of transformers",
        hint="pass the folder that holds config.json, *.safetensors and tokenizer.json",
    )


def _dtype_of(name: str) -> torch.dtype | None:
    if name == "keep":
        return None
    if name not in _DTYPES:
        raise ConfigError(
            f"`--dtype` does not know `{name}`", hint=nearest(name, ["keep", *_DTYPES])
        )
    return _DTYPES[name]


def _read(
    weights: ForeignWeights, config: ExpertConfig, dtype: torch.dtype, console: Console
) -> dict[str, Tensor]:
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("reading the weights", total=None)
        return weights.read(
            config, dtype, lambda done, total: bars.update(bar, completed=done, total=total)
        )


def _facts(
    output: Path, opened: _Opened, model: Transformer, settings: MixtureSettings
) -> dict[str, Any]:
    return {
        "path": str(output),
        "architecture": opened.foreign.family.architecture,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": sum(p.nbytes for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "context": settings.seq_len,
        "vocab_size": model.config.vocab_size,
        "tokens": opened.tokenizer.tokenizer.vocab_size,
        "bos": opened.tokenizer.bos,
        "bos_source": opened.tokenizer.bos_source,
        "bos_id": settings.bos_id,
        "stop_ids": list(settings.stop_ids),
        "stop_tokens": [_name_of(index, opened.tokenizer) for index in settings.stop_ids],
        "notes": list(opened.foreign.notes),
    }


def _name_of(index: int, foreign: ForeignTokenizer) -> str | None:
    """How a token is spelled; None for a row of the tables that has no token."""
    tokenizer = foreign.tokenizer
    if index == tokenizer.bos_id:
        return foreign.bos
    return (tokenizer.decode([index]) if index < tokenizer.vocab_size else "") or None


@torch.no_grad()
def compare_logits(source: Path, model: Transformer) -> float:
    """The largest difference between our logits and those of `transformers`, both in float32.

    Raises MissingExtraError, and CheckpointError where it is more than rounding explains or
    `transformers` cannot load the folder.
    """
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise MissingExtraError("transformers", extra="export", needed_for="`--check`") from None
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        theirs = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # its validation may fail in any way
        raise CheckpointError(
            f"`--check`: transformers cannot load {source}: {' '.join(str(error).split())}",
            hint="mend its config.json, or leave `--check` out: nothing was written",
        ) from None
    for parameter in theirs.parameters():  # what `--dtype` rounded is no difference
        parameter.copy_(parameter.to(model.dtype))
    length = min(_CHECKED_TOKENS, model.config.seq_len)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, length), generator=generator)
    ours = build_expert(model.config, _widened(model), device=torch.device("cpu"), keep=True)
    expected = theirs(tokens).logits
    difference = float((ours(tokens) - expected).abs().max())
    if not difference <= _MOST_DIFFERENCE * max(1.0, float(expected.abs().max())):
        raise CheckpointError(
            f"the logits differ from those of transformers by {difference:.2g}",
            hint="the import would not be exact: nothing was written; please report this model",
        )
    return difference


def _widened(model: Transformer) -> dict[str, Tensor]:
    tied = {"head.weight"} if model.config.tie_embeddings else set()
    return {k: t.float() for k, t in model.state_dict().items() if k not in tied}


def import_table(result: dict[str, Any]) -> Table:
    """What was imported, for people."""
    table = Table(show_header=False, box=None, title=f"{result['architecture']} → {result['path']}")
    size = format_bytes(result["bytes"])
    table.add_row("parameters", f"{result['parameters']:,} ({result['dtype']}, {size})")
    table.add_row("context", f"{result['context']:,} tokens")
    padding = result["vocab_size"] - result["tokens"]
    spare = f", {padding:,} rows without a token" if padding else ""
    table.add_row("vocabulary", f"{result['tokens']:,} tokens{spare}")
    table.add_row("documents begin with", escape(f"{result['bos']} ({result['bos_source']})"))
    table.add_row("texts end with", escape(_stops_of(result)) or "the same")
    table.add_row("chat template", "kept" if result["chat_template"] else "none")
    for note in result["notes"]:
        table.add_row("note", note)
    if "check" in result:
        difference = result["check"]["largest_logit_difference"]
        table.add_row("check", f"largest logit difference to transformers {difference:.1e}")
    table.add_row("next", f"pyper generate {result['path']} -p …")
    table.add_row("", f"pyper prepare TEXTS -o DATA --tokenizer {result['path']}/tokenizer.json")
    table.add_row("", f"pyper train RUN.toml --set train.start_from={result['path']}")
    return table


def _stops_of(result: dict[str, Any]) -> str:
    """Names with ids; a name may be a control character."""
    stops = zip(result["stop_tokens"], result["stop_ids"], strict=True)
    return ", ".join(f"{visible(name or 'no token')} ({index})" for name, index in stops)
