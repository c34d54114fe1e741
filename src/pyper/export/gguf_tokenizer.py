"""A byte-level BPE in the words of GGUF (`tokenizer.ggml.…`, model `gpt2`).

llama.cpp does not read the pattern that cuts text into words: it knows some by name
(`tokenizer.ggml.pre`). Those named here merge by rank alone, as the `tokenizers` library does;
`llama-bpe`, which has the same pattern as `smaug-bpe`, first looks whole words up.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pyper.data import TextTokenizer
from pyper.errors import TokenizerError

_TAIL = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
_OF_LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_OURS = r"'(?:[sdmt]|ll|ve|re)|"
_GPT2 = "ByteLevel"
_NOTES = {
    _OURS + _TAIL: "llama.cpp takes contractions in capitals too: after an apostrophe before S, T, "
    "M, D, LL, RE or VE (as in 'The) the same text is cut into other, equally valid tokens.",
    _OF_LLAMA_3 + _TAIL: None,
    _OF_LLAMA_3 + _TAIL.replace("{1,3}", ""): None,
    _GPT2: None,
}
_NAMES = {
    _OURS + _TAIL: "smaug-bpe",
    _OF_LLAMA_3 + _TAIL: "smaug-bpe",
    _OF_LLAMA_3 + _TAIL.replace("{1,3}", ""): "qwen2",
    _GPT2: "gpt-2",
}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


@dataclass(frozen=True)
class GGUFTokenizer:
    """What `tokenizer.ggml.…` holds."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str
    note: str | None
    """How llama.cpp cuts text differently, where it does."""


def gguf_tokenizer(tokenizer: TextTokenizer, n_rows: int) -> GGUFTokenizer:
    """The vocabulary, filled up to the `n_rows` of the embedding table.

    Raises TokenizerError for a tokenizer that llama.cpp cannot be told of.
    """
    settings = _settings(tokenizer)
    model = settings["model"]
    _check(settings)
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    pattern = _pattern(settings)
    if merges and pattern not in _NAMES:
        raise TokenizerError(
            f"llama.cpp has no name for this tokenizer's pattern `{pattern}`",
            hint="export `--to hf`, or train with `--tokenizer bpe` or `bytes`",
        )
    tokens = [f"[unused{i}]" for i in range(n_rows)]
    types = [_UNUSED] * n_rows
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, _NORMAL
    for added in settings["added_tokens"]:
        kind = _CONTROL if added["special"] else _USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    bos = tokens[tokenizer.bos_id]
    return GGUFTokenizer(
        tokens,
        types,
        # llama.cpp insists on merges; no text is ever cut so that this one applies.
        merges or [f"{bos} {bos}"],
        _NAMES.get(pattern, "smaug-bpe"),
        _NOTES.get(pattern) if merges else None,
    )


def _settings(tokenizer: TextTokenizer) -> dict[str, Any]:
    """tokenizer.json."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        tokenizer.save(path)
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return settings


def _check(settings: dict[str, Any]) -> None:
    model = settings["model"]
    wrong = {
        f"a {model['type']} model": model["type"] != "BPE",
        "a decoder that is not byte-level": (settings["decoder"] or {}).get("type") != "ByteLevel",
        "a normalizer": settings["normalizer"] is not None,
        "`ignore_merges`": bool(model.get("ignore_merges")),
        "a prefix or suffix of words": bool(
            model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        ),
    }
    for what, is_wrong in wrong.items():
        if is_wrong:
            raise TokenizerError(
                f"the tokenizer has {what}: this export knows plain byte-level BPE",
                hint="export `--to hf`",
            )


def _pattern(settings: dict[str, Any]) -> str:
    """The regular expression that cuts text, or what stands for it."""
    pre = settings["pre_tokenizer"] or {}
    steps = pre.get("pretokenizers", [pre])
    if [step.get("type") for step in steps] == ["ByteLevel"] and not steps[0]["add_prefix_space"]:
        return _GPT2 if steps[0]["use_regex"] else "none"
    if [step.get("type") for step in steps] == ["Split", "ByteLevel"]:
        split, byte_level = steps
        if split["behavior"] == "Isolated" and not split["invert"] and not byte_level["use_regex"]:
            return str(split["pattern"].get("Regex"))
    return json.dumps(pre, ensure_ascii=False)
