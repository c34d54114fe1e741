"""One expert on texts that are at hand: a run of one, without seed, control or evaluation."""

import json
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from pyper.checkpoint import storage_errors
from pyper.config import ExpertConfig, PrepareConfig, TrainConfig, parse_run
from pyper.errors import ConfigError, DataError
from pyper.stages.assign import assign
from pyper.stages.context import open_context
from pyper.stages.mix import mix
from pyper.stages.pipeline import train_missing
from pyper.stages.prepare import prepare_with_progress


def train_on_texts(
    texts: Iterable[str] | Path,
    model: ExpertConfig,
    train: TrainConfig,
    folder: Path,
    prepare: PrepareConfig,
    *,
    seq_len: int,
    device: str,
    random_seed: int,
    console: Console,
) -> None:
    """Train in `folder`, which then holds a mixture of one.

    texts: documents, or a folder that is prepared already. Raises what preparing and training
    raise.
    """
    data = texts if isinstance(texts, Path) else _prepare(texts, folder, prepare, console)
    values = {
        "run": {"folder": str(folder), "device": device, "random_seed": random_seed},
        "data": {"path": str(data), "seq_len": seq_len},
        "model": model.model_dump(mode="json", exclude_unset=True),
        "mixture": {"n_experts": 1, "router": "experts", "top_k": 1, "temperature": 0.1},
        "train": train.model_dump(mode="json", exclude_unset=True)
        | {"seed_fraction": 0.0, "control": False},
    }
    context = open_context(parse_run(values), console)
    assigned = assign(context)
    train_missing(context, assigned)
    mix(context, assigned)


def _prepare(texts: Iterable[str], folder: Path, config: PrepareConfig, console: Console) -> Path:
    file = folder / "texts.jsonl"
    with storage_errors(file):
        folder.mkdir(parents=True, exist_ok=True)
        with file.open("w", encoding="utf-8") as lines:
            for number, text in enumerate(texts):
                lines.write(json.dumps({config.text_key: _checked(text, number)}) + "\n")
    if file.stat().st_size == 0:
        raise DataError("there is no text to train on", hint="pass strings, one per document")
    prepare_with_progress([file], folder / "data", config, console)
    return folder / "data"


def _checked(text: object, number: int) -> str:
    if not isinstance(text, str):
        raise ConfigError(
            f"document {number} is not a string but {type(text).__name__}",
            hint="pass strings, one per document",
        )
    return text
