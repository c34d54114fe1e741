"""Chats with special tokens, prepared: behind one document token, and learned to their end."""

import json
from pathlib import Path

import pytest

from data.published_chats import CHAT, KINDS, build, id_of, theirs
from pyper.config import PrepareConfig
from pyper.data import TextTokenizer, TokenData, prepare
from pyper.data.chats import Chats
from pyper.data.weighing import encode_documents


def documents(
    kind: str, messages: list[dict[str, str]], tmp_path: Path
) -> tuple[list[int], list[int], TextTokenizer]:
    """Tokens and weights of the one chat, from a data folder."""
    tokenizer, _ = build(KINDS[kind], tmp_path / "model")
    chats = [json.dumps({"messages": messages})]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train.jsonl").write_text("\n".join(chats))
    config = PrepareConfig(
        tokenizer=str(tmp_path / "model" / "tokenizer.json"), valid_fraction=0, test_fraction=0
    )
    prepare([tmp_path / "in"], tmp_path / "out", config)
    documents = TokenData.open(tmp_path / "out").documents("train")
    assert documents.weights is not None
    return documents.tokens(0).tolist(), documents.weights[0].tolist(), tokenizer


@pytest.mark.parametrize("kind", ["qwen", "llama3", "mistral", "smol"])
def test_a_chat_is_what_transformers_make_of_it_behind_one_document_token(
    kind: str, tmp_path: Path
) -> None:
    messages = [CHAT[0], {"role": "assistant", "content": "4."}]
    tokens, _, tokenizer = documents(kind, messages, tmp_path)
    expected = theirs(tmp_path / "model", messages, add_generation_prompt=False)
    if expected[0] != tokenizer.bos_id:
        expected = [tokenizer.bos_id, *expected]
    assert tokens == expected


@pytest.mark.parametrize(
    ("kind", "end"), [("qwen", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("mistral", "</s>")]
)
def test_an_answer_and_its_end_token_are_learned_and_nothing_else(
    kind: str, end: str, tmp_path: Path
) -> None:
    messages = [CHAT[0], {"role": "assistant", "content": "4. " + end}, *CHAT[:2]]
    tokens, weights, tokenizer = documents(kind, messages, tmp_path)
    stop = id_of(tmp_path / "model", end)
    learned = [t for t, w in zip(tokens[1:], weights[1:], strict=True) if w]
    assert learned.count(stop) == 2
    answers = tokenizer.decode([t for t in learned if t != stop]).split()
    assert "".join(answers) == f"4.{end}1+3is4."
    ends = [i for i, token in enumerate(tokens) if token == stop]
    answered = [weights[i] for i in ends]
    assert answered == ([1, 1] if kind == "mistral" else [0] * (kind == "qwen") + [0, 1, 0, 1])


def test_special_tokens_of_plain_texts_are_text(tmp_path: Path) -> None:
    tokenizer, _ = build(KINDS["qwen"], tmp_path)
    text = "<|im_start|>user\nhi<|im_end|>"
    [(tokens, weights)] = encode_documents(tokenizer, [(text, None, ())])
    assert (tokens.tolist(), weights) == (tokenizer.encode(text), None)
    assert id_of(tmp_path, "<|im_start|>") not in tokens


def test_chats_know_the_tokens_of_the_tokenizer_that_is_named(tmp_path: Path) -> None:
    build(KINDS["qwen"], tmp_path)
    chats = Chats(PrepareConfig(tokenizer=str(tmp_path / "tokenizer.json")))
    chat = chats.render([{"role": "user", "content": "a <|im_end|>"}])
    assert [chat.text[a:b] for a, b in chat.typed] == ["<|im_end|>"]
