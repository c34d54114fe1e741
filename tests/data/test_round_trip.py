"""Tokenizers of others: do they give back what they were given?"""

from pathlib import Path

import pytest
from small_corpus import make_texts, write_jsonl
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from pyper.config import PrepareConfig
from pyper.data import TextTokenizer, TokenData, prepare
from pyper.data.round_trip import describe_changes
from pyper.errors import TokenizerError


def lower_casing(path: Path) -> Path:
    """A byte-level tokenizer behind a normalizer that drops capitals."""
    library = TextTokenizer.train_bpe(iter(["a mile of reeds " * 20]), 300)._tokenizer
    library.normalizer = normalizers.Lowercase()
    library.save(str(path))
    return path


def test_byte_level_tokenizers_change_nothing() -> None:
    texts = ["Any text\n\n at all é😀\0", "<|bos|>", ""]
    for tokenizer in (TextTokenizer.bytes_only(), TextTokenizer.train_bpe(iter(texts), 300)):
        assert describe_changes(tokenizer, texts) == ""


def test_a_normalizer_is_found_out_with_an_example_and_the_share(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(lower_casing(tmp_path / "t.json"))
    said = describe_changes(tokenizer, ["small", "the River ran", "Capital", "small too"])
    assert said.startswith("the tokenizer changes 50% of the texts (2 of a sample of 4)")
    assert "'the River ran' becomes 'the river ran'" in said


def test_unknown_words_are_found_out() -> None:
    library = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.decoder = decoders.Fuse()
    assert "becomes" in describe_changes(TextTokenizer(library), ["b"])


def test_prepare_warns_or_refuses(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", [f"Text {text}" for text in make_texts(40, seed=1)])
    config = PrepareConfig(tokenizer=str(lower_casing(tmp_path / "t.json")))
    strict = config.model_copy(update={"strict_tokenizer": True})
    with pytest.raises(TokenizerError, match="changes 100%") as caught:
        prepare([tmp_path / "in.jsonl"], tmp_path / "out", strict)
    assert "--strict-tokenizer" in caught.value.hint
    assert not (tmp_path / "out").exists()
    said: list[str] = []
    prepare([tmp_path / "in.jsonl"], tmp_path / "out", config, warn=said.append)
    assert len(said) == 1
    assert "Text" in said[0]


def test_special_tokens_in_text_stay_text_in_any_tokenizer(tmp_path: Path) -> None:
    library = TextTokenizer.train_bpe(iter(["end of text " * 30]), 280)._tokenizer
    library.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    library.save(str(tmp_path / "t.json"))
    texts = [f"{i} says <|endoftext|> and <|bos|>" for i in range(30)]
    write_jsonl(tmp_path / "in.jsonl", texts)
    config = PrepareConfig(tokenizer=str(tmp_path / "t.json"), strict_tokenizer=True)
    prepare([tmp_path / "in.jsonl"], tmp_path / "out", config)
    data = TokenData.open(tmp_path / "out")
    documents, tokenizer = data.documents("train"), data.tokenizer()
    special = {documents.bos_id, tokenizer._tokenizer.token_to_id("<|endoftext|>")}
    for i in range(len(documents)):
        assert not special & set(documents.tokens(i)[1:].tolist())
        assert tokenizer.decode(documents.tokens(i)) in texts
