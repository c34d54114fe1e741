"""Prepared chats: which tokens of the shards, and of training windows, are learned."""

from pathlib import Path

import numpy as np
import pytest
from small_corpus import make_texts, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data.small_chats import BYTES, CHAT, chats, write_records
from pyper.config import PrepareConfig
from pyper.data import SPLITS, Documents, Packing, TextTokenizer, TokenData, prepare
from pyper.data.packing import permutation
from pyper.data.weighing import encode_documents
from pyper.errors import DataError


@pytest.fixture(scope="module")
def chat_data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    """A domain of chats and one of plain text."""
    folder = tmp_path_factory.mktemp("chats")
    write_records(folder / "in" / "talk.jsonl", chats(60))
    write_jsonl(folder / "in" / "prose.jsonl", make_texts(60, seed=5))
    config = PrepareConfig.model_validate(BYTES | {"shard_tokens": 2048})
    prepare([folder / "in"], folder / "out", config)
    return TokenData.open(folder / "out", verify=True)


def learned(documents: Documents, tokenizer: TextTokenizer, document: int) -> str:
    """The text of a document's tokens that have a weight."""
    assert documents.weights is not None
    shard, start = documents.shard_index[document], documents.starts[document]
    stop = start + documents.lengths[document]
    weights = documents.weights[shard][start:stop]
    return tokenizer.decode(documents.tokens(document)[1:][weights[1:] == 1])


def test_the_shards_weigh_the_answers_of_every_chat_and_nothing_else(chat_data: TokenData) -> None:
    found = []
    for split in SPLITS:
        documents = chat_data.documents(split, ["talk"])
        assert len(documents) > 0
        found += [learned(documents, chat_data.tokenizer(), i) for i in range(len(documents))]
    expected = [f"A{i}{'a' * (i % 5)}<|end|>\nA end<|end|>\n" for i in range(60)]
    assert sorted(found) == sorted(expected)


def test_plain_text_beside_chats_has_no_weights_and_together_weights_of_one(
    chat_data: TokenData,
) -> None:
    assert chat_data.documents("train", ["prose"]).weights is None
    everything = chat_data.documents("train")
    prose = np.flatnonzero(everything.domain_index == 0)
    assert everything.select(prose).weights is None
    assert everything.weights is not None
    shards = np.unique(everything.shard_index[prose])
    assert all((everything.weights[i] == 1).all() for i in shards)


@pytest.mark.parametrize("seq_len", [16, 50, 700])
@pytest.mark.parametrize("shuffle", [True, False])
def test_windows_have_the_weights_of_a_loop_over_tokens(
    chat_data: TokenData, seq_len: int, shuffle: bool
) -> None:
    """The obvious stream: documents in order, `bos` weighing what the token before it weighs."""
    documents = chat_data.documents("train")
    packing = Packing(documents, seq_len=seq_len, random_seed=3, epoch=1, shuffle=shuffle)
    tokens = packing.sequences(range(packing.n_sequences))
    weights = packing.weights(range(packing.n_sequences))
    assert weights is not None
    assert weights.shape == (len(tokens), seq_len)
    by_window = {row.tobytes(): w for row, w in zip(tokens, weights, strict=True)}

    stream, marks = [], []
    order = permutation(len(documents), 3, 1, purpose=0) if shuffle else np.arange(len(documents))
    assert documents.weights is not None
    for document in order:
        shard, start = documents.shard_index[document], int(documents.starts[document])
        for t, token in enumerate(documents.tokens(document)):
            stream.append(int(token))
            own = int(documents.weights[shard][start + t])
            marks.append((marks[-1] if marks else 1) if t == 0 else own)
    for k in range(packing.n_sequences):
        window = np.array(stream[k * seq_len : (k + 1) * seq_len + 1], dtype=np.int64)
        np.testing.assert_array_equal(
            by_window[window.tobytes()], marks[k * seq_len + 1 : (k + 1) * seq_len + 1]
        )


def test_the_end_after_the_last_answer_is_learned_and_after_a_question_it_is_not(
    tmp_path: Path,
) -> None:
    ends_asking = {"messages": [*CHAT, {"role": "user", "content": "one more"}]}
    records = [{"messages": CHAT}, ends_asking, {"text": "plain"}]
    write_records(tmp_path / "in" / "train.jsonl", records)
    config = PrepareConfig(tokenizer="bytes", valid_fraction=0, test_fraction=0)
    prepare([tmp_path / "in"], tmp_path / "out", config)
    documents = TokenData.open(tmp_path / "out").documents("train")
    packing = Packing(documents, seq_len=documents.n_tokens - 1, random_seed=0, shuffle=False)
    tokens, weights = packing.sequence(0), packing.weights([0])
    assert weights is not None
    ends = np.flatnonzero(tokens == documents.bos_id)[1:]
    assert weights[0][ends - 1].tolist() == [1, 0]
    assert weights[0][ends[-1] :].all()


def test_plain_text_before_and_between_chats_of_one_shard_has_weights_of_one(
    tmp_path: Path,
) -> None:
    records = [{"text": "one"}, {"text": "two"}, {"messages": CHAT}, {"text": "three"}]
    write_records(tmp_path / "in" / "train.jsonl", records)
    config = PrepareConfig(tokenizer="bytes", valid_fraction=0, test_fraction=0)
    prepare([tmp_path / "in"], tmp_path / "out", config)
    data = TokenData.open(tmp_path / "out")
    documents = data.documents("train")
    found = [learned(documents, data.tokenizer(), i) for i in range(4)]
    assert found == ["one", "two", "hi there<|end|>\nsee you<|end|>\n", "three"]
    assert documents.weights is not None
    assert len(documents.weights[0]) == documents.n_tokens


def test_chats_are_not_cut_where_documents_are(tmp_path: Path) -> None:
    """One long text gives no fair shares by hash, so it is cut; the chats beside it are not."""
    long = "".join(f"line {i}\n" for i in range(2000))
    write_records(tmp_path / "in" / "talk.jsonl", [{"text": long}, *chats(20)])
    prepare([tmp_path / "in"], tmp_path / "out", PrepareConfig.model_validate(BYTES))
    data = TokenData.open(tmp_path / "out")
    tokenizer, found = data.tokenizer(), []
    for split in SPLITS:
        documents = data.documents(split)
        found += [tokenizer.decode(documents.tokens(i)) for i in range(len(documents))]
    assert sum(text.startswith("<|user|>") for text in found) == 20
    assert sum(text.startswith("line") for text in found) == 3
    assert all(text.endswith("A end<|end|>\n") for text in found if text.startswith("<|user|>"))


def test_a_folder_of_chats_holds_its_template_and_notices_another(tmp_path: Path) -> None:
    write_records(tmp_path / "in" / "talk.jsonl", chats(30))
    config = PrepareConfig.model_validate(BYTES)
    manifest = prepare([tmp_path / "in"], tmp_path / "out", config)
    assert manifest.counts["chats"] == 30
    assert "<|end|>" in (tmp_path / "out" / "chat_template.jinja").read_text()
    assert prepare([tmp_path / "in"], tmp_path / "out", config) == manifest
    (tmp_path / "t.jinja").write_text("other")
    other = config.model_copy(update={"chat_template": tmp_path / "t.jinja"})
    with pytest.raises(DataError, match="chat_template changed"):
        prepare([tmp_path / "in"], tmp_path / "out", other)
    (tmp_path / "out" / "chat_template.jinja").write_text("changed")
    with pytest.raises(DataError, match=r"chat_template\.jinja"):
        TokenData.open(tmp_path / "out")


def test_damaged_weights_are_noticed(chat_data: TokenData, tmp_path: Path) -> None:
    path = chat_data.path / "train" / "talk-000.weights"
    content = path.read_bytes()
    try:
        path.write_bytes(bytes([1 - content[0]]) + content[1:])
        with pytest.raises(DataError, match=r"talk-000\.weights is damaged"):
            TokenData.open(chat_data.path, verify=True)
    finally:
        path.write_bytes(content)


def test_answers_are_tokenized_as_a_model_writes_them_after_the_prompt() -> None:
    """No token straddles the edge of an answer, whatever the merges would like."""
    tokenizer = TextTokenizer.train_bpe(iter(["](answer)](answer)" * 50]), 300)
    text, spans = "[q](answer) [q](answer)", ((3, 11),)
    assert len(tokenizer.encode("](answer)")) < len(tokenizer.encode("]")) + len(
        tokenizer.encode("(answer)")
    )
    [(tokens, weights)] = encode_documents(tokenizer, [(text, spans, ())])
    assert weights is not None
    assert tokens[weights == 1].tolist() == tokenizer.encode("(answer)")
    assert tokens.tolist() == [
        *tokenizer.encode("[q]"),
        *tokenizer.encode("(answer)"),
        *tokenizer.encode(" [q](answer)"),
    ]


def test_tokenizers_that_mark_the_start_of_a_text_are_weighed_by_offsets() -> None:
    library = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "▁c": 2, "?": 3}, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    tokenizer = TextTokenizer(library)
    [(tokens, weights), (plain, none)] = encode_documents(
        tokenizer, [("a b c b", ((2, 5),), ()), ("a b", None, ())]
    )
    assert tokens.tolist() == [0, 1, 2, 1]
    assert weights is not None
    assert weights.tolist() == [0, 1, 1, 0]
    [(_, edge)] = encode_documents(tokenizer, [("a b c b", ((1, 3),), ())])
    assert edge is not None
    assert edge.tolist() == [0, 1, 0, 0]
    assert (plain.tolist(), none) == ([0, 1], None)
