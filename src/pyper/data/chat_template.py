"""From the messages of a chat to one text, for the model to learn from or to go on from."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from pyper.data.special_tokens import SpecialTokens, TypedMarks, Written
from pyper.data.tokenizer import TextTokenizer
from pyper.errors import ConfigError, MissingExtraError, PromptError

MAX_TEMPLATE_CHARS = 64 << 10
_ANY_ANSWER = "an answer like no other"
_MAX_MARK_CHARS = 64
TEMPLATE_FILE = "chat_template.jinja"
_TOKENIZER_CONFIG = "tokenizer_config.json"

PLAIN_TEMPLATE = (
    "{%- for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""For chats whose tokenizer brings no template. Its marks are text, as everything is."""


class ChatTemplate:
    """Messages as one text.

    Without a template the texts of all messages follow each other, line by line: a model that was
    trained on plain documents goes on from the last one. A Jinja template (the `chat_template` of
    a `tokenizer_config.json`) runs in a sandbox: it sees the messages and nothing else.
    """

    def __init__(self, source: str | None) -> None:
        """Raises ConfigError when the template cannot be read, MissingExtraError."""
        self._template = None if source is None else _compile(source)

    def render(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """messages: with `role` and `content`. Raises PromptError when the template refuses.

        add_generation_prompt: end with what an answer follows.
        """
        if self._template is None:
            return "\n".join(m["content"] for m in messages if m["content"])
        try:
            text: str = self._template.render(
                messages=[dict(m) for m in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                bos_token="",
                eos_token="",
                raise_exception=_refuse,
                strftime_now=_strftime_now,
            )
        except PromptError:
            raise
        except Exception as error:  # a template may fail in any way that Python can
            raise PromptError(f"the chat template fails on these messages: {error}") from None
        return text

    def write(
        self,
        messages: Sequence[Mapping[str, str]],
        special: SpecialTokens,
        *,
        add_generation_prompt: bool = True,
    ) -> Written:
        """As `render`, knowing which special tokens in it are the template's own."""
        if self._template is None:
            text = self.render(messages)
            return Written(text, [(0, len(text))])
        marks = TypedMarks(special)
        hidden = [marks.hide(message) for message in messages]
        try:
            text = self.render(hidden, add_generation_prompt=add_generation_prompt)
        except PromptError as error:
            raise PromptError(marks.show(error.message).text, hint=error.hint) from None
        return marks.show(text)

    @cached_property
    def end_mark(self) -> str:
        """What the template writes behind an answer, without spaces; where a reply should stop."""
        question = {"role": "user", "content": "?"}
        answer = {"role": "assistant", "content": _ANY_ANSWER}
        if self._template is None:
            return ""
        try:
            text = self.render([question, answer], add_generation_prompt=False)
        except PromptError:
            return ""
        return text.rpartition(_ANY_ANSWER)[2].strip()[:_MAX_MARK_CHARS]


def encode_chat(
    tokenizer: TextTokenizer, template: ChatTemplate, messages: Sequence[Mapping[str, str]]
) -> list[int]:
    """The tokens that an answer to the messages follows, as `apply_chat_template` gives them.

    Behind the document token, as any text, unless the template begins with a special token of its
    own. Special tokens in messages are text. Raises PromptError when the template refuses.
    """
    special = tokenizer.special
    written = template.write(messages, special)
    found = special.find(written)
    if not found:
        return [tokenizer.bos_id, *tokenizer.encode(written.text)]
    ids: list[int] = special.encode(written, found)[0].tolist()
    begins_itself = not written.text[: found[0][0]].strip()
    return ids if begins_itself else [tokenizer.bos_id, *ids]


def read_template(file: Path) -> str:
    """The template in a file, and `bos_token` … of a tokenizer beside it. Raises ConfigError."""
    try:
        return _with_tokens(file.read_text(encoding="utf-8"), file.parent)
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"cannot read the chat template {file}: {getattr(error, 'strerror', None) or error}",
            hint=f"it must be a UTF-8 text file, and {_TOKENIZER_CONFIG} beside it JSON",
        ) from None


def find_template(folder: Path) -> str | None:
    """The template beside a mixture's tokenizer, if there is one. Raises ConfigError.

    The names `bos_token`, `eos_token` … of tokenizer_config.json become part of it, so that it
    says the same wherever it goes.
    """
    alone = folder / TEMPLATE_FILE
    try:
        if alone.is_file():
            return _with_tokens(alone.read_text(encoding="utf-8"), folder)
        source = _named(_tokenizer_config(folder).get("chat_template"))
        return None if source is None else _with_tokens(source, folder)
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"the chat template of {folder} cannot be read: {error}",
            hint=f"mend or delete {alone.name} or {_TOKENIZER_CONFIG}",
        ) from None


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    file = folder / _TOKENIZER_CONFIG
    if not file.is_file():
        return {}
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return values


def _with_tokens(source: str, folder: Path) -> str:
    """A template that knows the special tokens which it calls by name."""
    names = set(re.findall(r"\b[a-z]+_token\b", source))
    names -= set(re.findall(r"\bset\s+([a-z]+_token)\b", source))
    found = {name: _tokenizer_config(folder).get(name) for name in sorted(names)}
    texts = {n: v.get("content") if isinstance(v, dict) else v for n, v in found.items()}
    lines = [
        f"{{% set {name} = {json.dumps(text)} %}}\n"
        for name, text in texts.items()
        if isinstance(text, str)
    ]
    return "".join([*lines, source])


def _named(value: Any) -> str | None:
    """Some models have several, by name: the one called `default`."""
    if isinstance(value, list):
        value = next((t.get("template") for t in value if t.get("name") == "default"), None)
    return value if isinstance(value, str) else None


def _compile(source: str) -> Any:
    try:
        from jinja2 import TemplateSyntaxError, nodes
        from jinja2.ext import Extension
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise MissingExtraError("jinja2", extra="data", needed_for="a chat template") from None
    if len(source) > MAX_TEMPLATE_CHARS:
        raise ConfigError(
            f"the chat template has {len(source):,} characters",
            hint=f"templates may have {MAX_TEMPLATE_CHARS:,}",
        )

    class Generation(Extension):
        """`{% generation %}` marks answers for other programs; what is inside it is text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
        )
        environment.filters["tojson"] = _tojson
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"the chat template is not a Jinja template: {error}",
            hint="mend the file that was named, or `chat_template` in tokenizer_config.json",
        ) from None


def _refuse(message: str) -> None:
    raise PromptError(f"the chat template refuses these messages: {message}")


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # As transformers have it: Jinja's own is for HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
