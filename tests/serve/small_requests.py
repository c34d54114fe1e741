"""Bodies of requests that are right: two tokens after one letter."""

import json
from typing import Any

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
