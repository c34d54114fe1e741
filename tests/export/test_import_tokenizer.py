"""Which token begins the documents of a foreign model, and which end its answers."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from pyper.data import TextTokenizer
from pyper.errors import TokenizerError
from pyper.export.import_tokenizer import check_rows, read_tokenizer, stop_ids

N_BYTES = 256


def foreign(folder: Path, *special: str, first: str | None = None) -> Path:
    """A byte-level tokenizer with special tokens from id 256 on; `first` is put before texts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(name, special=True) for name in special])
    byte_level = processors.ByteLevel(trim_offsets=False)
    raw.post_processor = byte_level
    if first is not None:
        template = processors.TemplateProcessing(
            single=f"{first} $A",
            pair=f"{first} $A $B",
            special_tokens=[(first, raw.token_to_id(first))],
        )
        raw.post_processor = processors.Sequence([byte_level, template])
    folder.mkdir(parents=True, exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    ("special", "first", "config", "settings", "bos"),
    [
        # Qwen: no bos of its own, documents end with <|endoftext|>
        (("<|endoftext|>", "<|im_start|>", "<|im_end|>"), None, {"eos_token_id": 258}, {}, 256),
        # Qwen's config.json says so
        (("<|im_start|>", "<|endoftext|>"), None, {"bos_token_id": 257}, {}, 257),
        # Llama 3
        (("<|begin_of_text|>", "<|end_of_text|>"), "<|begin_of_text|>", {}, {}, 256),
        # SmolLM2 for chats: its `bos_token` begins a message
        (
            ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
            None,
            {"bos_token_id": 257, "eos_token_id": 258},
            {"bos_token": "<|im_start|>"},
            256,
        ),
        # a tokenizer with both, whose own choice counts
        (("<|endoftext|>", "<s>"), None, {}, {"bos_token": {"content": "<s>"}}, 257),
        # the tokenizer's template comes first
        (("<|endoftext|>", "[CLS]"), "[CLS]", {}, {"bos_token": "<|endoftext|>"}, 257),
        # names that nobody knows
        (("<a>", "<b>"), None, {"bos_token_id": 257}, {}, 257),
        (("<a>", "<b>"), None, {"eos_token_id": [256, 257]}, {}, 256),
        (("<a>", "<b>"), None, {"bos_token_id": 999, "eos_token_id": 257}, {}, 257),
    ],
)
def test_documents_begin_as_the_model_was_taught(
    special: tuple[str, ...],
    first: str | None,
    config: dict[str, Any],
    settings: dict[str, Any],
    bos: int,
    tmp_path: Path,
) -> None:
    found = read_tokenizer(foreign(tmp_path, *special, first=first), config, settings)
    assert found.tokenizer.bos_id == bos
    assert found.bos == special[bos - N_BYTES]
    assert found.tokenizer.vocab_size == N_BYTES + len(special)  # nothing was added
    found.tokenizer.save(tmp_path / "saved.json")
    again = TextTokenizer.load(tmp_path / "saved.json")  # as every later stage opens it
    assert (again.bos_id, again.fingerprint) == (bos, found.tokenizer.fingerprint)
    assert again.decode(again.encode("naïve <a> text")) == "naïve <a> text"


def test_a_model_without_any_is_refused_with_a_way_out(tmp_path: Path) -> None:
    folder = foreign(tmp_path, "<a>", "<b>")
    with pytest.raises(TokenizerError, match="begins or separates") as caught:
        read_tokenizer(folder, {}, {})
    assert "--bos" in caught.value.hint
    assert "`<a>`" in caught.value.hint
    assert read_tokenizer(folder, {}, {}, "<b>").tokenizer.bos_id == 257
    with pytest.raises(TokenizerError, match="no such token"):
        read_tokenizer(folder, {}, {}, "<c>")


def test_a_token_without_a_row_is_refused(tmp_path: Path) -> None:
    found = read_tokenizer(foreign(tmp_path, "<s>"), {}, {})
    check_rows(found.tokenizer, 257)
    check_rows(found.tokenizer, 300)
    with pytest.raises(TokenizerError, match="256 rows"):
        check_rows(found.tokenizer, 256)


@pytest.mark.parametrize(
    ("config", "generation", "ids"),
    [
        ({"eos_token_id": 2}, {}, (2,)),
        ({"eos_token_id": 2}, {"eos_token_id": [7, 5, 7]}, (5, 7)),
        ({"eos_token_id": [1, 900, -1, True, "x", None]}, {}, (1,)),
        ({}, {}, ()),
        ({"eos_token_id": None}, {"eos_token_id": None}, ()),
    ],
)
def test_what_ends_an_answer(
    config: dict[str, Any], generation: dict[str, Any], ids: tuple[int, ...]
) -> None:
    assert stop_ids(config, generation, 100) == ids


@pytest.mark.parametrize("content", ["{}", "[]", json.dumps({"model": {"type": "BPE"}}), "\0"])
def test_what_is_no_tokenizer_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"not a tokenizer\.json"):
        read_tokenizer(tmp_path, {}, {})
