import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from pyper.data.bos_token import BOS
from pyper.data.text_pieces import split_text
from pyper.data.tokenizer import TextTokenizer
from pyper.errors import TokenizerError

TEXT = "The river ran past the mill, and the mill ran past 1234567 rivers.\n" * 40
TRAINED = TextTokenizer.train_bpe(iter([TEXT]), 280)
BYTES = TextTokenizer.bytes_only()
# No lone surrogates: they are no text, and the readers replace them.
any_text = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.mark.parametrize("tokenizer", [TRAINED, BYTES])
@given(text=any_text)
@settings(max_examples=80, deadline=None)
def test_decoding_gives_back_the_text(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize("tokenizer", [TRAINED, BYTES])
def test_special_tokens_in_a_text_are_text(tokenizer: TextTokenizer) -> None:
    text = f"a{BOS}b {BOS}"
    assert tokenizer.bos_id not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_text_after_saving_too(tmp_path: Path) -> None:
    TRAINED.save(tmp_path / "tokenizer.json")
    loaded = TextTokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.fingerprint == TRAINED.fingerprint
    assert loaded.bos_id not in loaded.encode(BOS)
    assert loaded.encode(TEXT) == TRAINED.encode(TEXT)


def test_decoding_leaves_bos_out() -> None:
    assert TRAINED.decode([TRAINED.bos_id, *TRAINED.encode("one"), TRAINED.bos_id]) == "one"


def test_training_merges_and_stops_at_the_vocabulary_size() -> None:
    assert TRAINED.vocab_size == 280
    assert len(TRAINED.encode(TEXT)) < len(TEXT) // 2


def test_training_twice_gives_the_same_tokenizer() -> None:
    assert TextTokenizer.train_bpe(iter([TEXT]), 280).fingerprint == TRAINED.fingerprint


def test_numbers_are_cut_after_three_digits() -> None:
    tokenizer = TextTokenizer.train_bpe(iter(["20262026 " * 50]), 400)
    assert max(len(tokenizer.decode([i])) for i in tokenizer.encode("20262026")) <= 3


@given(text=st.text("ab \n\té", max_size=400), chars=st.integers(8, 50))
@settings(max_examples=100, deadline=None)
def test_pieces_are_short_and_make_up_the_text(text: str, chars: int) -> None:
    pieces = split_text(text, chars)
    assert "".join(pieces) == text
    assert all(len(piece) <= chars for piece in pieces)


def test_a_long_text_has_the_tokens_of_one_that_is_not_cut() -> None:
    text = "The mill ran past\n\n\n    the river's rivers; 1234\n  and\n" * 600
    tokenizer = TextTokenizer.train_bpe(iter([text]), 300)
    whole = tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
    assert len(split_text(text)) > 1
    assert tokenizer.encode(text) == whole
    for chars in range(300, 340):
        ids = [i for piece in split_text(text, chars) for i in tokenizer.encode(piece)]
        assert ids == whole


def test_a_line_without_end_is_encoded_in_linear_time() -> None:
    line = "x" * 1_000_000
    assert TRAINED.decode(TRAINED.encode(line)) == line


def test_a_partial_character_can_be_streamed() -> None:
    ids = BYTES.encode("é")
    assert [BYTES.decode_bytes([i]) for i in ids] == [b"\xc3", b"\xa9"]


def test_bytes_only_has_257_entries() -> None:
    assert BYTES.vocab_size == 257


def test_a_foreign_tokenizer_gets_a_bos_token(tmp_path: Path) -> None:
    foreign = Tokenizer(models.WordLevel({"one": 0, "two": 1, "?": 2}, unk_token="?"))
    foreign.pre_tokenizer = pre_tokenizers.Whitespace()
    foreign.save(str(tmp_path / "tokenizer.json"))
    tokenizer = TextTokenizer.load(tmp_path / "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.vocab_size) == (3, 4)
    assert tokenizer.encode("two one") == [1, 0]
    assert tokenizer.decode([3, 1, 0]) == "two one"


def test_a_foreign_end_of_text_token_serves_as_bos(tmp_path: Path) -> None:
    foreign = Tokenizer(models.WordLevel({"one": 0, "?": 1}, unk_token="?"))
    foreign.add_special_tokens(["<|endoftext|>"])
    foreign.save(str(tmp_path / "tokenizer.json"))
    tokenizer = TextTokenizer.load(tmp_path / "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.vocab_size) == (2, 3)


def test_an_ordinary_entry_that_looks_like_bos_stays_text(tmp_path: Path) -> None:
    foreign = Tokenizer(models.WordLevel({"<s>": 0, "?": 1}, unk_token="?"))
    foreign.save(str(tmp_path / "tokenizer.json"))
    tokenizer = TextTokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.encode("<s>") == [0]
    assert tokenizer.bos_id == 2


def test_a_byte_level_tokenizer_that_normalizes_streams_bytes_too(tmp_path: Path) -> None:
    TRAINED.save(tmp_path / "tokenizer.json")
    foreign = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    foreign.normalizer = normalizers.NFC()
    tokenizer = TextTokenizer(foreign)
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "é"
    assert b"".join(tokenizer.decode_bytes([i]) for i in tokenizer.encode("é")) == "é".encode()


@pytest.mark.parametrize("content", ["", "{}", json.dumps({"model": {"type": "Nothing"}})])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(TokenizerError, match="is not a tokenizer"):
        TextTokenizer.load(path)


PANICS_WHEN_READ = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}
PANICS_WHEN_USED = {
    "normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
}
ENDLESS_TABLE = {"model": {"type": "BPE", "vocab": {"a": 4_000_000_000}, "merges": []}}
NOTHING_UNKNOWN = {"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]}}


def write_changed(path: Path, changes: dict[str, Any]) -> Path:
    BYTES.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [(PANICS_WHEN_READ, "is not a tokenizer"), (ENDLESS_TABLE, "4,000,000,000")],
)
def test_a_file_on_which_the_library_dies_is_refused(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(TokenizerError, match=complaint):
        TextTokenizer.load(write_changed(tmp_path / "tokenizer.json", changes))


@pytest.mark.parametrize("changes", [PANICS_WHEN_USED, NOTHING_UNKNOWN])
def test_a_text_that_cannot_be_encoded_is_one_kind_of_error(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    tokenizer = TextTokenizer.load(write_changed(tmp_path / "tokenizer.json", changes))
    for encode in (tokenizer.encode, tokenizer.encode_with_offsets):
        with pytest.raises(TokenizerError, match="cannot encode"):
            encode("bb")


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"absent\.json"):
        TextTokenizer.load(tmp_path / "absent.json")


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(TokenizerError, match="outside the vocabulary"):
        BYTES.decode([257])
