"""Our tokenizer as a folder that `AutoTokenizer` opens and that encodes as we do."""

import json
from pathlib import Path
from typing import Any

from pyper.checkpoint import storage_errors
from pyper.data import TextTokenizer


def export_tokenizer(
    tokenizer: TextTokenizer, folder: Path, *, seq_len: int, chat_template: str | None
) -> None:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json, and the template.

    Texts are encoded behind the document token, which is also the end of a text. Special tokens
    inside a text are text, as they are to Pyper, unless the chat template is made of them. Raises
    StorageError.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "tokenizer.json"
        tokenizer.save(path)
        settings = json.loads(path.read_text(encoding="utf-8"))
        special = {t["content"]: t["id"] for t in settings["added_tokens"] if t["special"]}
        bos = next(name for name, index in special.items() if index == tokenizer.bos_id)
        settings["post_processor"] = bos_template(bos, tokenizer.bos_id)
        _write_json(path, settings)
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": bos,
            "pad_token": bos,
            "padding_side": "left",  # a batch of prompts ends where each goes on
            "model_max_length": seq_len,
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": not any(name in (chat_template or "") for name in special),
        }
        if chat_template is not None:  # in both places: readers know the one or the other
            config["chat_template"] = chat_template
            (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        _write_json(folder / "tokenizer_config.json", config)
        _write_json(folder / "special_tokens_map.json", {"bos_token": bos, "eos_token": bos})


def bos_template(bos: str, bos_id: int) -> dict[str, Any]:
    """The `post_processor` of a tokenizer.json that puts `bos` before every text."""
    token = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": which, "type_id": 0}} for which in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [token, first],
        "pair": [token, first, token, second],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
