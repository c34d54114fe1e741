"""The objects that go out: completions and chats, whole or in chunks."""

import json
import secrets
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from pyper.data import BOS, TextTokenizer
from pyper.generate import Event

_FLOOR = -9999.0
"""For probabilities of zero, as OpenAI writes them; JSON has no infinities."""


def to_json(value: Any) -> bytes:
    """ASCII: clients disagree about which other characters end a line."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")


def server_sent(value: Any) -> bytes:
    """One event of a stream."""
    return b"data: " + to_json(value) + b"\n\n"


LAST_EVENT = b"data: [DONE]\n\n"


class Usage:
    """Counts tokens: those of the prompts once, those written as they come."""

    def __init__(self, prompt_tokens: int) -> None:
        self._prompt, self._written = prompt_tokens, 0

    def count(self, events: Sequence[Event]) -> None:
        """Add what was written."""
        self._written += sum(event.token is not None for event in events)

    def to_dict(self) -> dict[str, int]:
        """The `usage` object."""
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._written,
            "total_tokens": self._prompt + self._written,
        }


def who_wrote(experts: Sequence[str], events: Sequence[Event]) -> dict[str, Any]:
    """The `pyper` field of a choice: the text by expert, and the weights averaged over tokens.

    `expert` has the largest weight on average; `weights` leaves out those without any.
    """
    n = len(events)
    means = [sum(e.weights[i] for e in events) / n for i in range(len(experts))]
    spans = []
    for expert, group in groupby(events, key=lambda event: event.expert):
        span = list(group)
        text = "".join(event.text for event in span)
        spans.append({"expert": experts[expert], "text": text, "tokens": len(span)})
    return {
        "expert": experts[means.index(max(means))],
        "weights": {n: round(w, 4) for n, w in zip(experts, means, strict=True) if w >= 5e-5},
        "spans": spans,
    }


class TokenNames:
    """Tokens as they appear among log-probabilities."""

    def __init__(self, tokenizer: TextTokenizer, stop_ids: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self.bos_id = tokenizer.bos_id
        self.ends = frozenset((self.bos_id, *stop_ids))
        """Tokens that end a text, and are no part of it."""

    def bytes_of(self, token: int) -> bytes:
        """What the token spells."""
        return BOS.encode() if token == self.bos_id else self._tokenizer.decode_bytes([token])

    def text_of(self, token: int) -> str:
        """As text; bytes of half a character as `bytes:\\xe2`, so that no two look alike."""
        spelled = self.bytes_of(token)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def of_chat(self, token: int, log_prob: float) -> dict[str, Any]:
        """One entry of a chat's `logprobs.content`."""
        return {
            "token": self.text_of(token),
            "logprob": max(log_prob, _FLOOR),
            "bytes": list(self.bytes_of(token)),
        }


@dataclass
class Answer:
    """One request's answer; the two kinds differ in what a choice looks like."""

    model: str
    experts: Sequence[str]
    names: TokenNames
    with_logprobs: bool

    kind = ""
    chunk_kind = ""
    prefix = ""

    def __post_init__(self) -> None:
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": self.model,
        }

    def whole(self, choices: Sequence[Sequence[Event]], usage: Usage) -> dict[str, Any]:
        """The answer in one piece."""
        written = [self.choice(index, events) for index, events in enumerate(choices)]
        return {"object": self.kind, **self._head, "choices": written, "usage": usage.to_dict()}

    def chunk(self, choices: list[dict[str, Any]], usage: Usage | None = None) -> dict[str, Any]:
        """A part of the answer; the last one holds the usage, and no choice."""
        counts = {} if usage is None else {"usage": usage.to_dict()}
        return {"object": self.chunk_kind, **self._head, "choices": choices, **counts}

    def opening(self, n_choices: int) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return []

    def choice(self, index: int, events: Sequence[Event]) -> dict[str, Any]:
        """A whole choice."""
        raise NotImplementedError

    def part(self, index: int, events: Sequence[Event]) -> dict[str, Any]:
        """What was added to a choice."""
        raise NotImplementedError

    def _with_author(self, choice: dict[str, Any], events: Sequence[Event]) -> dict[str, Any]:
        choice["finish_reason"] = events[-1].finished
        choice["pyper"] = who_wrote(self.experts, events)
        return choice

    def _drawn(self, events: Sequence[Event]) -> list[tuple[int, Event]]:
        """Tokens that were written; the one that ends a document is not text."""
        return [
            (event.token, event)
            for event in events
            if event.token is not None and event.token not in self.names.ends
        ]


class CompletionAnswer(Answer):
    """Of /v1/completions."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._offsets: Counter[int] = Counter()

    def choice(self, index: int, events: Sequence[Event]) -> dict[str, Any]:
        """A whole choice, or what was added to it: they look the same."""
        logprobs = self._logprobs(index, events) if self.with_logprobs else None
        text = "".join(event.text for event in events)
        return self._with_author({"index": index, "text": text, "logprobs": logprobs}, events)

    part = choice

    def _logprobs(self, index: int, events: Sequence[Event]) -> dict[str, Any]:
        offsets, drawn = [], self._drawn(events)
        for token, _ in drawn:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(self.names.text_of(token))
        return {
            "tokens": [self.names.text_of(token) for token, _ in drawn],
            "token_logprobs": [max(event.log_prob, _FLOOR) for _, event in drawn],
            "top_logprobs": [
                {self.names.text_of(t): max(p, _FLOOR) for t, p in event.alternatives}
                for _, event in drawn
            ],
            "text_offset": offsets,
        }


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def choice(self, index: int, events: Sequence[Event]) -> dict[str, Any]:
        text = "".join(event.text for event in events)
        message = {"role": "assistant", "content": text, "refusal": None}
        return self._chat_choice(index, "message", message, events)

    def part(self, index: int, events: Sequence[Event]) -> dict[str, Any]:
        text = "".join(event.text for event in events)
        return self._chat_choice(index, "delta", {"content": text}, events)

    def opening(self, n_choices: int) -> list[dict[str, Any]]:
        return [
            {
                "index": index,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
            for index in range(n_choices)
        ]

    def _chat_choice(
        self, index: int, key: str, message: dict[str, Any], events: Sequence[Event]
    ) -> dict[str, Any]:
        logprobs = self._logprobs(events) if self.with_logprobs else None
        return self._with_author({"index": index, key: message, "logprobs": logprobs}, events)

    def _logprobs(self, events: Sequence[Event]) -> dict[str, Any]:
        content = [
            {
                **self.names.of_chat(token, event.log_prob),
                "top_logprobs": [self.names.of_chat(t, p) for t, p in event.alternatives],
            }
            for token, event in self._drawn(events)
        ]
        return {"content": content, "refusal": None}
