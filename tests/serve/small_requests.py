"""Requests that are right: bodies for two tokens after one letter, and those of the client."""

import json
from typing import Any

import openai

COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 2}
CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "a"}],
    "max_tokens": 2,
}


def completion(**changes: Any) -> bytes:
    return json.dumps(COMPLETION | changes).encode()


def chat(**changes: Any) -> bytes:
    return json.dumps(CHAT | changes).encode()


def completion_of(client: openai.OpenAI, prompt: Any = "the fox", **changes: Any) -> Any:
    """What /v1/completions answers: twelve tokens, the same every time."""
    values = {"model": "tiny", "max_tokens": 12, "temperature": 0.7, "seed": 5}
    return client.completions.create(prompt=prompt, **(values | changes))


def chat_of(client: openai.OpenAI, text: str = "the fox", **changes: Any) -> Any:
    """What /v1/chat/completions answers to one message of a user."""
    values = {"model": "tiny", "max_tokens": 12, "temperature": 0.7, "seed": 5}
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(messages=messages, **(values | changes))
