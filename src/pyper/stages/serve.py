"""Open a saved model and serve it."""

import importlib.util
import os
from pathlib import Path

from rich.console import Console

from pyper.errors import ConfigError, MissingExtraError, UsageError
from pyper.generate import EngineLimits, Narrow
from pyper.serve.chat_template import open_template
from pyper.serve.settings import ServeSettings
from pyper.stages.write import OpenModel, open_model

KEY_VARIABLE = "PYPER_API_KEY"


def serve_model(
    path: Path,
    settings: ServeSettings,
    engine_limits: EngineLimits,
    console: Console,
    *,
    mixing: str | None,
    resident: int | None,
    device: str,
    narrow: Narrow | None = None,
    speculate: bool = False,
    draft: str | None = None,
    chat_template: Path | None,
) -> None:
    """Answer requests until a signal comes.

    speculate, draft: see `open_model`. Raises MissingExtraError without the extra `serve`,
    ConfigError, CheckpointError, TokenizerError.
    """
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, extra="serve", needed_for="`pyper serve`")
    from pyper.serve.server import listen, run_server, url_of

    with listen(settings) as listening:
        model = open_model(
            path,
            expert=None,
            mixing=mixing,
            resident=resident,
            device=device,
            narrow=narrow,
            speculate=speculate,
            draft=draft,
        )
        template = open_template(path, chat_template)
        _load_experts(model, resident)
        n, context = len(model.names), model.mixture.settings.seq_len
        console.print(
            f"{settings.name}: {n} expert{'s' * (n != 1)}, context {context:,}. "
            f"Listening on {url_of(listening)} (Ctrl-C stops)",
            highlight=False,
            soft_wrap=True,
        )
        run_server(
            model.mixture,
            model.tokenizer,
            template,
            settings,
            engine_limits,
            listening,
            model.drafter,
        )


def _load_experts(model: OpenModel, resident: int | None) -> None:
    """Before anyone asks: a damaged file is found now, and the first answer is not slow."""
    for index in range(min(resident or len(model.names), len(model.names))):
        model.mixture.expert(index)


def name_of(path: Path) -> str:
    """What the model is called in the API: the run, or the mixture's own folder."""
    folder = path.resolve()
    name = folder.parent.name if folder.name == "mixture" else folder.name
    return name or "model"


def read_key(file: Path | None, given: str | None) -> str | None:
    """The key of `--api-key-file`, of `--api-key`, or of PYPER_API_KEY.

    Raises ConfigError; UsageError for two keys.
    """
    if file is None:
        return given or os.environ.get(KEY_VARIABLE) or None
    if given:
        raise UsageError(
            "there are two API keys", hint="give `--api-key-file` or `--api-key`, not both"
        )
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the API key from {file}: {error}") from None
    if not key:
        raise ConfigError(f"{file} is empty", hint="write the API key into it")
    return key
