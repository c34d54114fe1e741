"""From the messages of a chat to the text that the model goes on from."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyper.errors import ConfigError, MissingExtraError, PromptError
from pyper.mixture import find_mixture

MAX_TEMPLATE_CHARS = 64 << 10


class ChatTemplate:
    """Messages as one text.

    Without a template the texts of all messages follow each other, line by line: a model that was
    trained on plain documents goes on from the last one. A Jinja template (the `chat_template` of
    a `tokenizer_config.json`) runs in a sandbox: it sees the messages and nothing else.
    """

    def __init__(self, source: str | None) -> None:
        """Raises ConfigError when the template cannot be read, MissingExtraError."""
        self._template = None if source is None else _compile(source)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """messages: with `role` and `content`. Raises PromptError when the template refuses."""
        if self._template is None:
            return "\n".join(m["content"] for m in messages if m["content"])
        try:
            text: str = self._template.render(
                messages=[dict(m) for m in messages],
                add_generation_prompt=True,
                bos_token="",
                eos_token="",
                raise_exception=_refuse,
            )
        except PromptError:
            raise
        except Exception as error:  # a template may fail in any way that Python can
            raise PromptError(f"the chat template fails on these messages: {error}") from None
        return text


def open_template(model: Path, file: Path | None) -> ChatTemplate:
    """The template in `file`, or else that of a run or a mixture. Raises ConfigError."""
    if file is None:
        return ChatTemplate(find_template(find_mixture(model)))
    try:
        return ChatTemplate(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read the chat template {file}: {getattr(error, 'strerror', None) or error}",
            hint="it must be a UTF-8 text file",
        ) from None


def find_template(folder: Path) -> str | None:
    """The template beside a mixture's tokenizer, if there is one. Raises ConfigError."""
    alone, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    try:
        if alone.is_file():
            return alone.read_text(encoding="utf-8")
        if config.is_file():
            return _named(json.loads(config.read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"the chat template of {folder} cannot be read: {error}",
            hint=f"mend or delete {alone.name} or {config.name}",
        ) from None
    return None


def _named(value: Any) -> str | None:
    """Some models have several, by name: the one called `default`."""
    if isinstance(value, list):
        value = next((t.get("template") for t in value if t.get("name") == "default"), None)
    return value if isinstance(value, str) else None


def _compile(source: str) -> Any:
    try:
        from jinja2 import TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise MissingExtraError("jinja2", extra="serve", needed_for="a chat template") from None
    if len(source) > MAX_TEMPLATE_CHARS:
        raise ConfigError(
            f"the chat template has {len(source):,} characters",
            hint=f"templates may have {MAX_TEMPLATE_CHARS:,}",
        )
    try:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"the chat template is not a Jinja template: {error}",
            hint="mend `chat_template` in tokenizer_config.json",
        ) from None


def _refuse(message: str) -> None:
    raise PromptError(f"the chat template refuses these messages: {message}")
