"""Chats to training text: one text, and where in it the answers are."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pyper.config import PrepareConfig
from pyper.data.chat_template import PLAIN_TEMPLATE, ChatTemplate, find_template, read_template
from pyper.data.special_tokens import Span, SpecialTokens, Written
from pyper.data.tokenizer import TextTokenizer
from pyper.errors import PromptError

Message = dict[str, str]

_KEYS = ("messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
"""ShareGPT's names; any other role is handed to the template as it is."""


class Chat(NamedTuple):
    """A text that was read: of a chat, or plain."""

    text: str
    answers: tuple[Span, ...] | None = None
    """What the assistant says, end marks included; None where it is no chat."""
    typed: tuple[Span, ...] = ()
    """What spells special tokens in a chat and is none."""


class Chats:
    """What turns the messages of records into text.

    Attributes:
        keys: under which messages are looked for.
        source: the Jinja template: the file that was named, else the one beside the tokenizer,
            else a plain one.
    """

    def __init__(self, config: PrepareConfig, tokenizer: TextTokenizer | None = None) -> None:
        """tokenizer: the one that `config` names, if any. Raises ConfigError when the template
        cannot be read."""
        self.keys = (config.columns["messages"],) if "messages" in config.columns else _KEYS
        self.is_named = "messages" in config.columns
        self.source = _find_source(config)
        self._config, self._tokenizer = config, tokenizer

    @cached_property
    def _template(self) -> ChatTemplate:
        # Only when a chat comes: most data need no Jinja.
        return ChatTemplate(self.source)

    @cached_property
    def _special(self) -> SpecialTokens:
        if self._tokenizer is not None:
            return self._tokenizer.special
        if self._config.tokenizer in ("bpe", "bytes"):  # one yet to be trained has the same ones
            return TextTokenizer.bytes_only().special
        return TextTokenizer.load(Path(self._config.tokenizer)).special

    def key_in(self, record: Mapping[str, Any]) -> str | None:
        """The key under which a record holds messages."""
        return next((key for key in self.keys if isinstance(record.get(key), list)), None)

    def render(self, messages: Sequence[Message]) -> Chat:
        """The text of a chat, and its answers.

        An answer is what a longer chat has more than the shorter one and the template's prompt. One
        that comes first answers nothing, and is not learned. Raises PromptError when the template
        refuses, or what it writes for a message changes as the chat goes on.
        """
        whole = self._write(messages)
        spans = []
        for n, message in enumerate(messages):
            if message["role"] != "assistant" or n == 0:
                continue
            before = self._write(messages[:n], prompt=True).text
            after = self._write(messages[: n + 1]).text
            if not (whole.text.startswith(after) and after.startswith(before)):
                raise PromptError(
                    f"the chat template writes the beginning of a chat in another way when message "
                    f"{n + 1} follows, so that answers cannot be told from the rest",
                    hint="use another one with `--chat-template FILE`",
                )
            spans.append((len(before), len(after)))
        return Chat(whole.text, tuple(spans), tuple(whole.typed))

    def _write(self, messages: Sequence[Message], *, prompt: bool = False) -> Written:
        return self._template.write(messages, self._special, add_generation_prompt=prompt)


def read_messages(value: list[Any]) -> list[Message] | None:
    """Messages as `role` and `content`; None when they are something else.

    Reads OpenAI's form, whose content may be a list of parts, and ShareGPT's `from` and `value`.
    Calls of tools, whose content is null, are something else: templates write them each in its way.
    """
    messages = []
    for item in value:
        if not isinstance(item, Mapping):
            return None
        role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        if isinstance(content, list):
            content = _join(content)
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        messages.append({"role": _ROLES.get(role, role), "content": content})
    return messages or None


def fault_of(value: list[Any]) -> str:
    """Why `read_messages` cannot read these, for people; nothing where it can."""
    for number, item in enumerate(value, start=1):
        if read_messages([item]) is None:
            role = item.get("role", item.get("from")) if isinstance(item, Mapping) else None
            missing = "text in its `content`" if isinstance(role, str) else "`role`"
            return f"message {number} has no {missing}"
    return "" if value else "there are no messages"


def _join(parts: list[Any]) -> str | None:
    """Parts of a content: all must be text."""
    found = [part.get("text") for part in parts if isinstance(part, Mapping)]
    texts = [text for text in found if isinstance(text, str)]
    return "".join(texts) if len(texts) == len(parts) else None


def _find_source(config: PrepareConfig) -> str:
    if config.chat_template is not None:
        return read_template(config.chat_template)
    if config.tokenizer in ("bpe", "bytes"):
        return PLAIN_TEMPLATE
    return find_template(Path(config.tokenizer).parent) or PLAIN_TEMPLATE
