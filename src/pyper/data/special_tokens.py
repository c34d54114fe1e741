"""Special tokens that a chat template writes are tokens; those that somebody typed are text."""

import json
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pyper.errors import PromptError

Span = tuple[int, int]
"""Characters [start, stop)."""
_HALVES = re.compile("[\ud800-\udfff]")
_MARK = re.compile("\ud800([0-9]+)\udc00")
_ALIAS_CHARS = 32


@dataclass(frozen=True, slots=True)
class Written:
    """What a template made of messages.

    Attributes:
        text: all of it, as people read it.
        typed: the stretches, in order, that spell special tokens and were typed by somebody.
    """

    text: str
    typed: Sequence[Span] = ()

    def part(self, start: int, stop: int) -> "Written":
        """The characters [start, stop) alone."""
        inside = [(max(a, start), min(b, stop)) for a, b in self.typed]
        typed = [(a - start, b - start) for a, b in inside if a < b]
        return Written(self.text[start:stop], typed)


class SpecialTokens:
    """The special tokens of a tokenizer, found where a template wrote them.

    Added tokens that look like marks (`<tool_call>`, `[INST]`) count as special even where the
    tokenizer does not say so. In the assistant's own messages they do not: a model that thinks
    between `<think>` and `</think>` writes these itself.

    A text is encoded by the tokenizer itself, for whom the special tokens have names that nobody
    can know and that replace those which the template wrote. All else in the text is then no
    special token, whatever it spells, and what the library does around one it does as ever.
    """

    def __init__(self, settings: Mapping[str, Any], bos_id: int) -> None:
        """settings: the content of a tokenizer.json."""
        added = [token for token in settings["added_tokens"] if token["content"]]
        marks = [t for t in added if t["special"] or t["content"][0] in "<["]
        self.bos = next(token["content"] for token in added if token["id"] == bos_id)
        self.any = re.compile(_any_of({t["content"] for t in marks}))
        self.certain = re.compile(_any_of({t["content"] for t in marks if t["special"]}))
        salt = secrets.token_hex(12)
        self._aliases = {t["content"]: f"{salt}{t['id']:08d}" for t in marks}
        self._settings = settings
        self._opened: tuple[Tokenizer, dict[int, int]] | None = None

    def find(self, written: Written) -> list[Span]:
        """Where the template wrote special tokens."""
        found, at = [], 0
        for start, stop in [*written.typed, (len(written.text),) * 2]:
            found += [match.span() for match in self.any.finditer(written.text, at, start)]
            at = stop
        return found

    def encode(
        self, written: Written, found: Sequence[Span]
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.int64]]:
        """Token ids (T,), without `bos`, and the characters where each starts, stops.

        found: what `find` says.
        """
        parser, true_ids = self._parser()
        encoding = parser.encode(self._with_aliases(written.text, found), add_special_tokens=False)
        ids = np.array([true_ids.get(i, i) for i in encoding.ids], dtype=np.uint32)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        begins, ends = _before_renaming(offsets, found).T
        return ids, begins, ends

    def _with_aliases(self, text: str, found: Sequence[Span]) -> str:
        parts, at = [], 0
        for start, stop in found:
            parts += [text[at:start], self._aliases[text[start:stop]]]
            at = stop
        return "".join([*parts, text[at:]])

    def _parser(self) -> tuple[Tokenizer, dict[int, int]]:
        """The tokenizer with other names, and the true ids of its added tokens."""
        if self._opened is None:
            parser = _renamed(self._settings, self._aliases)
            true_ids = {
                self._aliases.get(token["content"], token["content"]): token["id"]
                for token in self._settings["added_tokens"]
            }
            # The library numbers names that are not in the vocabulary anew.
            numbered = parser.get_added_tokens_decoder().items()
            self._opened = parser, {index: true_ids[token.content] for index, token in numbered}
        return self._opened

    def nameless_tokenizer(self) -> Tokenizer:
        """One to whom no text spells a special token, not even as a word of its vocabulary."""
        names = {t["content"] for t in self._settings["added_tokens"] if t["special"]}
        return _renamed(self._settings, {n: a for n, a in self._aliases.items() if n in names})


class TypedMarks:
    """Stands in for special tokens in messages while a template is at work.

    The stand-ins are halves of surrogate pairs, which no text holds.
    """

    def __init__(self, special: SpecialTokens) -> None:
        self._special = special
        self._typed: dict[str, int] = {}

    def hide(self, message: Mapping[str, str]) -> dict[str, str]:
        """A message without special tokens. Raises PromptError for half a surrogate pair."""
        for value in message.values():
            if _HALVES.search(value):
                raise PromptError("a message is not UTF-8 text", hint="convert it to UTF-8")
        special, role = self._special, message.get("role", "")
        pattern = special.certain if role == "assistant" else special.any
        hidden = {k: pattern.sub(lambda m: self._mark(m[0]), text) for k, text in message.items()}
        if role and role in special.bos:  # `<|{{ role }}|>` must not begin a document
            hidden["role"] = self._mark(role)
        return hidden

    def show(self, text: str) -> Written:
        """What the template made of them, with what was typed in its place again."""
        names = {str(index): name for name, index in self._typed.items()}
        parts, typed, length, at = [], [], 0, 0
        for match in _MARK.finditer(text):
            before = _HALVES.sub("", text[at : match.start()])
            name = names.get(match[1], "")  # a template may do anything to a text
            length += len(before) + len(name)
            typed.append((length - len(name), length))
            parts += [before, name]
            at = match.end()
        return Written("".join([*parts, _HALVES.sub("", text[at:])]), typed)

    def _mark(self, name: str) -> str:
        return f"\ud800{self._typed.setdefault(name, len(self._typed))}\udc00"


def _renamed(settings: Mapping[str, Any], aliases: Mapping[str, str]) -> Tokenizer:
    """The tokenizer of a tokenizer.json, with other names for some of its added tokens."""

    def rename(token: dict[str, Any]) -> dict[str, Any]:
        alias = aliases.get(token["content"])
        changes = {"content": alias, "normalized": False, "single_word": False}
        return token if alias is None else token | changes

    added = [rename(token) for token in settings["added_tokens"]]
    model = _renamed_words(settings["model"], aliases)
    values = {**settings, "model": model, "added_tokens": added, "post_processor": None}
    return Tokenizer.from_str(json.dumps(values))


def _renamed_words(model: dict[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """BPE comes to a word by merges, which none leads to a special token; others look it up."""
    if model["type"] == "BPE":
        return model
    vocab, unknown = model["vocab"], model.get("unk_token")
    if isinstance(vocab, dict):
        vocab = {aliases.get(word, word): index for word, index in vocab.items()}
    else:
        vocab = [[aliases.get(word, word), score] for word, score in vocab]
    names = {} if unknown is None else {"unk_token": aliases.get(unknown, unknown)}
    return {**model, **names, "vocab": vocab}


def _before_renaming(offsets: NDArray[np.int64], found: Sequence[Span]) -> NDArray[np.int64]:
    """Offsets in the text whose special tokens were not renamed yet."""
    starts, stops = np.array(found, dtype=np.int64).reshape(-1, 2).T
    growth = np.cumsum(_ALIAS_CHARS - (stops - starts))
    n_before = np.searchsorted(stops + growth, offsets, side="right")
    moved: NDArray[np.int64] = offsets - np.concatenate([[0], growth])[n_before]
    return moved


def _any_of(names: Collection[str]) -> str:
    """A pattern for any of the names, the longest that fits; linear in the text for thousands."""
    rests: dict[str, set[str]] = {}
    for name in names:
        if name:
            rests.setdefault(name[0], set()).add(name[1:])
    if not rests:
        return ""
    heads = "|".join(re.escape(head) + _any_of(rest) for head, rest in sorted(rests.items()))
    return f"(?:{heads}){'?' if '' in names else ''}"
