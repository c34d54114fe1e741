"""Small texts for the tests."""

import json
import random
from pathlib import Path

LINE = "the river ran past a mill and a mile of reeds; nobody counted 1234 — ever\n"


def make_texts(n: int, seed: int) -> list[str]:
    """Different texts of 1 to 60 words."""
    rng, words = random.Random(seed), LINE.split(" ")
    return [f"{i}. " + " ".join(rng.choices(words, k=rng.randint(1, 60))) for i in range(n)]


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
