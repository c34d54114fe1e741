"""From messages to text: plain, by a template, and never by more than that."""

import json
from pathlib import Path

import pytest

from pyper.data.chat_template import (
    MAX_TEMPLATE_CHARS,
    PLAIN_TEMPLATE,
    ChatTemplate,
    find_template,
    read_template,
)
from pyper.errors import ConfigError, PromptError
from serve.small_server import KEY, Server

MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello <|bos|>"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "again"},
]


def test_without_a_template_texts_follow_each_other_line_by_line() -> None:
    assert ChatTemplate(None).render(MESSAGES) == "be brief\nhello <|bos|>\nagain"


def test_a_template_sees_the_messages_as_transformers_show_them() -> None:
    source = (
        "{{ bos_token }}{% for message in messages %}\n"
        "  {%- if message['content'] == '' %}{% continue %}{% endif %}\n"
        "<|{{ message.role }}|>{{ message['content'] | trim }}\n"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    expected = "<|system|>be brief\n<|user|>hello <|bos|>\n<|user|>again\n<|assistant|>"
    assert ChatTemplate(source).render(MESSAGES) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% set x = messages.append({'role': 'user'}) %}",
        "{{ messages[0].update({'role': 'user'}) }}",
        "{{ open('/etc/passwd').read() }}",
        "{% include '/etc/passwd' %}",
        "{{ 1 / 0 }}",
        "{{ nothing.at.all }}",
        "{{ raise_exception('roles must alternate') }}",
    ],
)
def test_a_template_reaches_nothing_else(source: str) -> None:
    with pytest.raises(PromptError, match="the chat template"):
        print(ChatTemplate(source).render(MESSAGES))


@pytest.mark.parametrize("source", ["{% bad %}", "{{", "x" * (MAX_TEMPLATE_CHARS + 1)])
def test_what_is_no_template_is_refused_at_the_start(source: str) -> None:
    with pytest.raises(ConfigError):
        ChatTemplate(source)


class TestFinding:
    """Beside the tokenizer."""

    @pytest.mark.parametrize(
        ("value", "found"),
        [
            ("a", "a"),
            ([{"name": "tools", "template": "b"}, {"name": "default", "template": "c"}], "c"),
            ([{"name": "tools", "template": "b"}], None),
            (None, None),
        ],
    )
    def test_in_the_tokenizer_config(
        self, tmp_path: Path, value: object, found: str | None
    ) -> None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
        assert find_template(tmp_path) == found

    def test_a_file_of_its_own_comes_first(self, tmp_path: Path) -> None:
        assert find_template(tmp_path) is None
        (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "a"}')
        (tmp_path / "chat_template.jinja").write_text("b")
        assert find_template(tmp_path) == "b"

    @pytest.mark.parametrize("content", ["{", "[]", '"x"'])
    def test_a_broken_one_is_refused(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(ConfigError, match="cannot be read"):
            find_template(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '"x"'])
def test_a_broken_file_beside_a_named_template_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "t.jinja").write_text("{{ bos_token }}")
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ConfigError, match="cannot read the chat template"):
        read_template(tmp_path / "t.jinja")


def test_the_server_writes_after_what_the_template_makes(hasty_server: Server) -> None:
    common = {"model": "tiny", "max_tokens": 6, "seed": 1}
    key = {"Authorization": f"Bearer {KEY}"}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat = hasty_server.post(
        "/v1/chat/completions", common | {"messages": messages}, headers=key
    ).json()
    plain = hasty_server.post(
        "/v1/completions", common | {"prompt": "[user]a[assistant]b[assistant]"}, headers=key
    ).json()
    assert chat["choices"][0]["message"]["content"] == plain["choices"][0]["text"]
    assert chat["usage"] == plain["usage"]


def test_messages_that_a_template_refuses_are_a_400(hasty_server: Server) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "forbidden"}]}
    key = {"Authorization": f"Bearer {KEY}"}
    reply = hasty_server.post("/v1/chat/completions", body, headers=key)
    assert reply.status_code == 400
    assert "not that word" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("source", "mark"),
    [
        (PLAIN_TEMPLATE, "<|end|>"),
        ("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}", ""),
        ("{% for m in messages %}{{ m.content }}</s>\n{% endfor %}", "</s>"),
        ("{{ raise_exception('never') }}", ""),
        (None, ""),
    ],
)
def test_a_reply_stops_at_what_the_template_writes_behind_an_answer(
    source: str | None, mark: str
) -> None:
    assert ChatTemplate(source).end_mark == mark
