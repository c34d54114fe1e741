"""Bodies that no honest client sends. Each gets its 4xx, and the server goes on."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from pyper.data import TextTokenizer
from serve.raw_http import exchange, head, post
from serve.small_requests import chat, completion
from serve.small_server import CONTEXT, Server, save_small_mixture, serving


def test_the_requests_below_are_wrong_in_one_thing_only(server: Server) -> None:
    assert post(server, completion()).status == 200
    assert post(server, chat(), "/v1/chat/completions").status == 200


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"n": 10**9}, "n"),
        ({"n": 0}, "n"),
        ({"n": -1}, "n"),
        ({"n": 16, "prompt": ["a"] * 5}, "n"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"max_tokens": CONTEXT + 1}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"max_tokens": "2"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"logprobs": 10**6}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt": "x" * CONTEXT}, "prompt"),
        ({"prompt": [1] * CONTEXT}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": [257]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [2**62]}, "prompt"),
        ({"prompt": [1, 0, 1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 1e300}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["x"] * 10**5}, "stop"),
        ({"stop": ""}, "stop.0"),
        ({"stop": ["a", ""]}, "stop.1"),
        ({"stop": "x" * 10**5}, "stop.0"),
        ({"guided_regex": "(a+)+$"}, "guided_regex"),
        ({"guided_json": {}}, "guided_json"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"best_of": 5}, "best_of"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"logit_bias": {"5": 100}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"temprature": 0.5}, "temprature"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, None),
        ({"model": ""}, "model"),
        ({"model": ["tiny"]}, "model"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_field_out_of_range_is_refused_by_name(
    server: Server, changes: dict[str, Any], param: str | None
) -> None:
    reply = post(server, completion(**changes))
    assert reply.status == 400, reply.body
    assert reply.error["param"] == param
    assert reply.error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": ""}]}, None),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": "x" * CONTEXT}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": []}]},
            "messages.0.tool_calls",
        ),
        ({"max_completion_tokens": 5}, None),
        ({"top_logprobs": 3}, None),
        ({"logprobs": True, "top_logprobs": 10**6}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_chat_out_of_range_is_refused_by_name(
    server: Server, changes: dict[str, Any], param: str | None
) -> None:
    reply = post(server, chat(**changes), "/v1/chat/completions")
    assert reply.status == 400, reply.body
    assert reply.error["param"] == param


def test_images_are_refused_and_never_fetched(server: Server) -> None:
    image = {"type": "image_url", "image_url": {"url": f"{server.url}/fetched-by-the-server"}}
    fetched = 'pyper_requests_total{path="other",status="404"}'
    before = server.metric(fetched)
    messages = [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, image]}]
    reply = post(server, chat(messages=messages), "/v1/chat/completions")
    assert (reply.status, reply.error["param"]) == (400, "messages.0.content.1.type")
    assert server.metric(fetched) == before


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"a"',
        b"{",
        b'{"model": "tiny", "prompt": "a"',
        b'{"model": "tiny", "prompt": "a"} {}',
        b"{'model': 'tiny'}",
        b'\xef\xbb\xbf{"model": "tiny", "prompt": "a"}',
        completion()[:-1] + b', "temperature": NaN}',
        completion()[:-1] + b', "temperature": Infinity}',
        completion()[:-1] + b', "temperature": 1e999}',
        completion()[:-1] + b', "temperature": -1e999}',
        completion()[:-1] + b', "metadata": {"x": 1e999}}',
        completion()[:-1] + b', "prompt": "b"}',
        completion()[:-1] + b', "\\u0070rompt": "b"}',
        completion()[:-1] + b', "metadata": {"x": 1, "x": 2}}',
        completion()[:-1] + b', "max_tokens": 5}',
        completion()[:-1] + b', "user": "\\ud800"}',
        completion()[:-1] + b', "metadata": {"\\udfff": 1}}',
        b'{"model": "tiny", "prompt": "a\\ud83d"}',
        b'{"model": "tiny", "prompt": "\xed\xa0\x80"}',
        b'{"model": "tiny", "prompt": "\xff\xfe"}',
        b'{"model": "tiny", "prompt": "\xe2\x82',
        b'{"model": "tiny", "prompt": "a\nb"}',
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"model": "tiny", "prompt": ' + b"[" * 100 + b"1" + b"]" * 100 + b"}",
        completion()[:-1] + b', "seed": ' + b"9" * 5000 + b"}",
        completion()[:-1] + b', "temperature": 0.' + b"9" * 5000 + b"e9999}",
        completion(prompt="a").decode().encode("utf-16"),
    ],
    ids=lambda body: repr(body[-40:]),
)
def test_a_body_that_is_not_strict_json_is_refused(server: Server, body: bytes) -> None:
    reply = post(server, body)
    assert reply.status == 400, reply.body
    assert reply.error["type"] == "invalid_request_error"


def test_a_hundred_thousand_prompts_are_counted_and_not_read(server: Server) -> None:
    began = time.monotonic()
    for body, path in (
        (completion(prompt=["a"] * 10**5), "/v1/completions"),
        (json.dumps({"model": "tiny", "input": ["a"] * 10**5}).encode(), "/v1/embeddings"),
    ):
        assert post(server, body, path).status == 400
    assert time.monotonic() - began < 3


def test_many_different_keys_and_one_twice_take_no_time(server: Server) -> None:
    keys = [f'"{i}":1' for i in range(80_000)]
    body = ("{" + ",".join([*keys, '"79999":1']) + "}").encode()
    began = time.monotonic()
    assert "79999" in post(server, body).error["message"]
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("text", ["<|bos|>", "a<|bos|>b", "<|endoftext|>", "<s>"])
def test_special_tokens_in_a_text_are_text(server: Server, text: str) -> None:
    reply = post(server, completion(prompt=text))
    assert reply.status == 200
    assert json.loads(reply.body)["usage"]["prompt_tokens"] == 1 + len(text)


@pytest.mark.parametrize(
    "model",
    ["../../etc", "/etc/passwd", "tiny/expert-4", "tiny/expert--1", "tiny/", "TINY", "a" * 200],
)
def test_only_the_listed_models_exist(server: Server, model: str) -> None:
    reply = post(server, completion(model=model))
    assert (reply.status, reply.error["code"]) == (404, "model_not_found")
    assert (
        exchange(server, head(server, f"/v1/models/{model}", method="GET") + b"\r\n").status == 404
    )


def test_a_text_that_the_tokenizer_cannot_encode_is_refused(tmp_path: Path) -> None:
    letters = [(letter, -1.0) for letter in ["a", *map(chr, range(0x4E00, 0x4EFF))]]
    tokenizer = TextTokenizer(Tokenizer(models.Unigram(letters, byte_fallback=False)))
    with serving(save_small_mixture(tmp_path, tokenizer)) as server:
        assert post(server, completion(prompt="a")).status == 200
        for path, body in (
            ("/v1/completions", completion(prompt="b")),
            ("/v1/chat/completions", chat(messages=[{"role": "user", "content": "b"}])),
            ("/v1/embeddings", json.dumps({"model": "tiny", "input": "b"}).encode()),
        ):
            reply = post(server, body, path)
            assert reply.status == 400, reply.body
            assert "cannot encode" in reply.error["message"]
