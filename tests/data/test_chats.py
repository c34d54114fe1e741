"""Chats as they are read: one text each, and where its answers are."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.small_chats import CHAT, write_records
from pyper.config import PrepareConfig
from pyper.data import ReadCounts, TextTokenizer
from pyper.data.chats import Chats, read_messages
from pyper.data.readers import Document, read_documents
from pyper.errors import ConfigError, DataError, PromptError


def answers_of(text: str, spans: tuple[tuple[int, int], ...] | None) -> list[str]:
    assert spans is not None
    return [text[a:b] for a, b in spans]


def write_array(path: Path, records: list[Any]) -> Path:
    path.write_text(json.dumps(records))
    return path


def read(*sources: Path, **settings: Any) -> tuple[list[Document], ReadCounts]:
    counts = ReadCounts()
    config = PrepareConfig.model_validate(settings)
    return list(read_documents(list(sources), config, counts)), counts


def test_the_plain_template_marks_who_speaks_and_answers_end_with_their_mark() -> None:
    text, spans, _ = Chats(PrepareConfig()).render(CHAT)
    assert text == (
        "<|system|>\nbe brief<|end|>\n<|user|>\nhello<|end|>\n<|assistant|>\nhi there<|end|>\n"
        "<|user|>\nbye<|end|>\n<|assistant|>\nsee you<|end|>\n"
    )
    assert answers_of(text, spans) == ["hi there<|end|>\n", "see you<|end|>\n"]


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
    ],
)
def test_a_template_of_ones_own_gives_the_same_answers(tmp_path: Path, source: str) -> None:
    (tmp_path / "t.jinja").write_text(source)
    config = PrepareConfig(chat_template=tmp_path / "t.jinja")
    text, spans, _ = Chats(config).render(CHAT)
    assert text.startswith("[system]be brief</s>[user]hello</s>[assistant]hi there</s>")
    assert answers_of(text, spans) == ["hi there</s>", "see you</s>"]


def test_the_template_beside_the_tokenizer_comes_before_the_plain_one(tmp_path: Path) -> None:
    TextTokenizer.bytes_only().save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "mine"}')
    config = PrepareConfig(tokenizer=str(tmp_path / "tokenizer.json"))
    assert Chats(config).source == "mine"


def test_a_template_that_rewrites_what_it_wrote_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(PromptError, match="when message 3 follows"):
        Chats(PrepareConfig(chat_template=tmp_path / "t.jinja")).render(CHAT)


def test_an_answer_that_comes_first_is_text_but_not_learned() -> None:
    text, spans, _ = Chats(PrepareConfig()).render([{"role": "assistant", "content": "ha"}, *CHAT])
    assert text.startswith("<|assistant|>\nha")
    assert len(answers_of(text, spans)) == 2


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], ["user", "assistant"]),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], ["user"]),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], None),
        ([{"role": "user"}], None),
        (["a"], None),
        ([], None),
    ],
)
def test_messages_of_other_forms_are_read_or_not_at_all(value: list[Any], expected: Any) -> None:
    messages = read_messages(value)
    assert (None if messages is None else [m["role"] for m in messages]) == expected


def test_records_of_both_kinds_mix_and_what_is_neither_is_counted(tmp_path: Path) -> None:
    path = write_records(
        tmp_path / "a.jsonl",
        [
            {"messages": CHAT},
            {"text": "plain"},
            {"text": "plain too", "messages": CHAT},
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {"messages": CHAT[:2]},
            {"messages": [1]},
        ],
    )
    documents, counts = read(path)
    assert [d.answers is not None for d in documents] == [True, False, False, True]
    assert (counts.chats, counts.chats_without_answers, counts.malformed_lines) == (2, 1, 1)
    named, _ = read(path, columns="messages=messages")
    assert [d.answers is not None for d in named] == [True, False, True]


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "w"}}]}


def test_calls_of_tools_are_left_out_and_counted(tmp_path: Path) -> None:
    called = {"messages": [CHAT[1], CALL, {"role": "tool", "content": "20"}, CHAT[2]]}
    records = [called, {"messages": CHAT}, called, {"text": None, "messages": [CALL]}]
    for path in (
        write_records(tmp_path / "a.jsonl", records),
        write_array(tmp_path / "b.json", records),
    ):
        documents, counts = read(path)
        assert (len(documents), counts.malformed_lines, counts.chats) == (1, 3, 1)


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([CHAT[1], CALL], "message 2 has no text in its `content`"),
        ([{"role": None, "content": "a"}], "message 1 has no `role`"),
        ([CHAT[1], None], "message 2 has no `role`"),
        ([], "there are no messages"),
    ],
)
def test_a_file_without_one_good_chat_says_what_the_first_lacks(
    tmp_path: Path, messages: list[Any], why: str
) -> None:
    lines = write_records(tmp_path / "a.jsonl", [{"messages": messages}] * 2)
    with pytest.raises(DataError, match=f"the first bad line is 1: {why}"):
        read(lines)
    array = write_array(tmp_path / "b.json", [{"messages": messages}] * 2)
    with pytest.raises(DataError, match=f"the first bad row is 0: {why}"):
        read(array)


def test_messages_under_a_name_that_no_record_has_are_missed_by_that_name(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.jsonl", [{"messages": CHAT}])
    with pytest.raises(DataError, match=r"no key `text\|msgs`; keys there: `messages`"):
        read(path, columns="messages=msgs")


def test_messages_are_cleaned_before_answers_are_measured(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a\0\r\nb"}, {"role": "assistant", "content": "\ufeffx\0y"}]
    documents, counts = read(write_records(tmp_path / "a.jsonl", [{"messages": chat}]))
    assert answers_of(documents[0].text, documents[0].answers) == ["xy<|end|>\n"]
    assert counts.nul_bytes == 2


def test_a_file_whose_chats_are_all_refused_says_why(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    path = write_records(tmp_path / "a.jsonl", [{"messages": CHAT}])
    with pytest.raises(DataError, match=r"the first is 1: .*roles must alternate"):
        read(path, chat_template=tmp_path / "t.jinja")


def test_a_template_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the chat template"):
        Chats(PrepareConfig(chat_template=tmp_path / "none.jinja"))
