"""Exported tokenizers encode in `transformers` as they do here."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from export.small_stock import transformers
from pyper.data import TextTokenizer
from pyper.export import export_tokenizer
from pyper.export.import_tokenizer import read_tokenizer
from pyper.generate import encode_prompt

TEXTS = [
    "",
    "Once upon a time, in 1984 …",
    "  two  spaces\n\n\tand a tab \r\n",
    "naïve Ωμέγα 深い 🦊",
    "a document may hold <|bos|> as text, and <|im_start|> too",
]


def bpe() -> TextTokenizer:
    return TextTokenizer.train_bpe(iter([text * 20 for text in TEXTS]), 300)


@pytest.mark.parametrize("make", [TextTokenizer.bytes_only, bpe])
@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_encoded_and_decoded_alike(make: object, text: str, tmp_path: Path) -> None:
    ours: TextTokenizer = make()  # type: ignore[operator]
    export_tokenizer(ours, tmp_path, seq_len=64, chat_template=None)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs(text)["input_ids"]
    assert ids == encode_prompt(ours, text, 10_000)
    assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids) == text
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)


def test_what_surrounds_it_is_said(tmp_path: Path) -> None:
    export_tokenizer(bpe(), tmp_path, seq_len=64, chat_template=None)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.bos_token == theirs.eos_token == "<|bos|>"
    assert theirs.bos_token_id == bpe().bos_id
    assert theirs.model_max_length == 64
    assert theirs.chat_template is None


def test_two_texts_are_two_documents(tmp_path: Path) -> None:
    ours = TextTokenizer.bytes_only()
    export_tokenizer(ours, tmp_path, seq_len=64, chat_template=None)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = [ours.bos_id, *ours.encode("a"), ours.bos_id, *ours.encode("b")]
    assert theirs("a", "b")["input_ids"] == expected


def test_a_chat_template_goes_with_it_and_its_marks_are_tokens(tmp_path: Path) -> None:
    raw = Tokenizer.from_str(TextTokenizer.bytes_only()._tokenizer.to_str())
    raw.add_special_tokens(["<|im_start|>"])
    template = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
    export_tokenizer(TextTokenizer(raw), tmp_path, seq_len=64, chat_template=template)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=True)
    ids = ids["input_ids"] if not isinstance(ids, list) else ids
    assert raw.token_to_id("<|im_start|>") in ids


def test_exported_and_imported_again_it_is_the_same_tokenizer(tmp_path: Path) -> None:
    ours = bpe()
    export_tokenizer(ours, tmp_path, seq_len=64, chat_template=None)
    assert read_tokenizer(tmp_path, {}, {}).tokenizer.fingerprint == ours.fingerprint
