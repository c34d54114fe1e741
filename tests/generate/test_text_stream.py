import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pyper.data import TextTokenizer
from pyper.generate import TextStream

BYTES = TextTokenizer.bytes_only()


def pieces_of(text: str, *stop: str) -> tuple[list[str], TextStream]:
    """What a stream shows after each byte of `text`, and at the end."""
    stream, shown = TextStream(BYTES, stop), []
    for token in BYTES.encode(text):
        shown.append(stream.push(token))
        if stream.stopped:
            break
    return [*shown, stream.finish()], stream


def test_characters_appear_whole() -> None:
    pieces, stream = pieces_of("aé€😀z")
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀", "z", ""]
    assert not stream.stopped


def test_half_a_character_at_the_end_becomes_a_replacement() -> None:
    stream = TextStream(BYTES, ())
    tokens = BYTES.encode("a€")[:-1]
    assert "".join(stream.push(t) for t in tokens) == "a"
    assert stream.finish() == "\ufffd"


def test_bytes_that_are_no_text_do_not_swallow_what_follows() -> None:
    stream = TextStream(BYTES, ())
    tokens = [BYTES.encode("€")[0], *BYTES.encode("ab"), BYTES.encode("é")[1], *BYTES.encode("c")]
    assert "".join(stream.push(t) for t in tokens) + stream.finish() == "\ufffdab\ufffdc"


def test_the_document_token_has_no_text() -> None:
    stream = TextStream(BYTES, ())
    assert stream.push(BYTES.bos_id) == ""


TEXT = "12 plus 30 makes 42, and 13 plus 30 makes 43; plus plus plus"


def sentencepiece(metaspace: bool) -> TextTokenizer:
    """As of Llama 2 and Mistral: words begin with their space, rare characters are bytes."""
    library = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if metaspace:
        library.pre_tokenizer = pre_tokenizers.Metaspace()
        first: list[decoders.Decoder] = [decoders.Metaspace()]
        last: list[decoders.Decoder] = []
    else:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        library.normalizer = normalizers.Sequence(steps)
        first = [decoders.Replace("▁", " ")]
        last = [decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence([*first, decoders.ByteFallback(), decoders.Fuse(), *last])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    library.train_from_iterator(TEXT.split() if metaspace else TEXT.split(" "), trainer)
    # Bytes are ordinary entries, not special tokens, as in the published ones.
    settings = json.loads(library.to_str())
    settings["added_tokens"] = settings["added_tokens"][:3]
    return TextTokenizer(Tokenizer.from_str(json.dumps(settings)))


def word_pieces() -> TextTokenizer:
    library = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=60, special_tokens=["[UNK]", "<s>"], show_progress=False
    )
    library.train_from_iterator([TEXT, "plum making"], trainer)
    return TextTokenizer(library)


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (sentencepiece(metaspace=False), TEXT + " é 漢  字 plus"),
        (sentencepiece(metaspace=True), TEXT + " é 漢 字 plus"),
        (word_pieces(), TEXT + " plum, making 13"),
    ],
    ids=["llama", "metaspace", "wordpiece"],
)
def test_words_keep_their_spaces_and_characters_whatever_the_tokenizer(
    tokenizer: TextTokenizer, text: str
) -> None:
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    assert " plus" in whole
    for n in (1, 4, 9):
        stream = TextStream(tokenizer, ())
        shown = "".join(stream.push(t) for t in ids[n:]) + stream.finish()
        assert tokenizer.decode(ids[:n]) + shown == whole


def test_a_stop_string_over_several_tokens_ends_the_text_before_it() -> None:
    pieces, stream = pieces_of("one\n\nUser: two", "\n\nUser:")
    assert "".join(pieces) == "one"
    assert stream.stopped


def test_text_that_might_begin_a_stop_string_waits_and_comes() -> None:
    pieces, stream = pieces_of("a\n\nUse it", "\n\nUser:")
    assert pieces[:6] == ["a", "", "", "", "", ""]
    assert pieces[6] == "\n\nUse "
    assert "".join(pieces) == "a\n\nUse it"
    assert not stream.stopped
    assert "".join(pieces_of("a\n\nUse", "\n\nUser:")[0]) == "a\n\nUse"


def test_a_stop_string_may_have_characters_of_several_bytes() -> None:
    pieces, stream = pieces_of("größe — nein", "— n")
    assert "".join(pieces) == "größe "
    assert stream.stopped


def test_a_token_that_holds_more_than_the_stop_string_is_cut() -> None:
    trained = TextTokenizer.train_bpe(iter(["hello there, hello there"] * 50), 300)
    stream = TextStream(trained, ("ll",))
    shown = [stream.push(t) for t in trained.encode("hello there") if not stream.stopped]
    assert len(shown) < len("hello there")  # merged tokens
    assert "".join(shown) + stream.finish() == "he"


def naive_stop(text: str, stops: list[str]) -> str:
    for length in range(1, len(text) + 1):
        found = [text[:length].find(s) for s in stops if s in text[:length]]
        if found:
            return text[: min(found)]
    return text


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="abé", max_size=14),
    stops=st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3),
)
def test_stopping_matches_the_obvious_search(text: str, stops: list[str]) -> None:
    pieces, stream = pieces_of(text, *stops)
    assert "".join(pieces) == naive_stop(text, stops)
    assert stream.stopped == any(s in text for s in stops)
