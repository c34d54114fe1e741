"""Chats of two topics, and a file of them."""

import json
from pathlib import Path
from typing import Any

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi there"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "see you"},
]
BYTES = {"tokenizer": "bytes", "valid_fraction": 0.2, "test_fraction": 0.2}


def write_records(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def chats(n: int) -> list[dict[str, Any]]:
    """Different chats; every answer begins with `A`, and nothing else holds that letter."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"question {i} " + "q" * (i % 7)},
                {"role": "assistant", "content": f"A{i}" + "a" * (i % 5)},
                {"role": "user", "content": "and?"},
                {"role": "assistant", "content": "A end"},
            ]
        }
        for i in range(n)
    ]
