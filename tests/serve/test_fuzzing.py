"""Requests by the thousand: whatever comes, the answer is a 200 or a 4xx, never a 5xx."""

import json
import os
import socket
from collections import Counter
from contextlib import suppress
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pyper.serve.api_error import ApiError
from pyper.serve.bodies import ChatBody, CompletionBody, EmbeddingBody
from pyper.serve.strict_json import MAX_DEPTH, parse_object
from serve.raw_http import head, post, request
from serve.small_server import Server

FEW = settings(
    max_examples=60, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    phases=(Phase.explicit, Phase.generate),
)  # fmt: skip
MANY = settings(FEW, max_examples=int(os.environ.get("PYPER_FUZZ", "4000")))
"""PYPER_FUZZ=25000 sends 100,000 requests."""

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)
FIELDS = sorted({f for b in (CompletionBody, ChatBody, EmbeddingBody) for f in b.model_fields})
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings")
VALID: dict[str, dict[str, Any]] = {
    PATHS[0]: {"model": "tiny", "prompt": "a", "max_tokens": 1},
    PATHS[1]: {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    PATHS[2]: {"model": "tiny", "input": "a"},
}
changes = st.dictionaries(st.sampled_from(FIELDS), values, max_size=3)


def send_changed(server: Server, path: str, changed: dict[str, Any]) -> int:
    if changed.get("max_tokens", 0) is None:  # until the context ends: text is not the matter here
        changed["max_tokens"] = 1
    body = VALID[path] | changed
    reply = post(server, json.dumps(body).encode(), path)
    assert reply.status in (200, 400, 404), (body, reply)
    if reply.status != 200:
        assert reply.error
    return reply.status


def send_bytes(server: Server, path: str, body: bytes) -> int:
    reply = post(server, body, path)
    assert reply.status in (200, 400, 404), (body, reply)
    return reply.status


def send_head(server: Server, junk: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(junk)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except ConnectionError:
            return
    assert answer == b"" or answer[9:10] in b"24", (junk, answer)


@FEW
@given(path=st.sampled_from(PATHS), changed=changes)
def test_fields_of_any_value(server: Server, path: str, changed: dict[str, Any]) -> None:
    send_changed(server, path, changed)


@FEW
@given(path=st.sampled_from(PATHS), body=st.binary(max_size=200))
def test_bodies_of_any_bytes(server: Server, path: str, body: bytes) -> None:
    assert send_bytes(server, path, body) == 400


@FEW
@given(junk=st.binary(max_size=300))
def test_connections_of_any_bytes(server: Server, junk: bytes) -> None:
    send_head(server, junk)
    send_head(server, head(server) + junk + b"\r\n\r\n")


@FEW
@given(at=st.integers(0, 400), by=st.binary(min_size=1, max_size=3), path=st.sampled_from(PATHS))
def test_requests_with_a_few_bytes_changed(server: Server, at: int, by: bytes, path: str) -> None:
    whole = request(server, json.dumps(VALID[path]).encode(), path)
    at %= len(whole)
    send_head(server, whole[:at] + by + whole[at + 1 :])


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_thousands_of_changed_fields(server: Server, path: str) -> None:
    statuses: Counter[int] = Counter()

    @MANY
    @given(changed=changes)
    def run(changed: dict[str, Any]) -> None:
        statuses[send_changed(server, path, changed)] += 1

    run()
    assert statuses[200] > 0
    assert statuses[400] > 1000


@pytest.mark.slow
def test_thousands_of_changed_bytes(server: Server) -> None:
    @MANY
    @given(
        at=st.integers(0, 400), by=st.binary(min_size=1, max_size=3), path=st.sampled_from(PATHS)
    )
    def run(at: int, by: bytes, path: str) -> None:
        whole = request(server, json.dumps(VALID[path]).encode(), path)
        send_head(server, whole[: at % len(whole)] + by + whole[at % len(whole) + 1 :])

    run()


@pytest.mark.parametrize("n", [15, pytest.param(300, marks=pytest.mark.slow)])
def test_schemathesis_finds_no_failure(server: Server, n: int) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    schema.config.base_url = server.url
    statuses: Counter[int] = Counter()
    for result in schema.get_all_operations():
        operation = result.ok()
        statuses += exercise(operation, n)
    assert statuses[200] > 0
    assert {s for s in statuses if s >= 500} == set()


def exercise(operation: Any, n: int) -> Counter[int]:
    """Cases of one operation, those that follow its schema and those that do not."""
    statuses: Counter[int] = Counter()

    modes = [schemathesis.GenerationMode.POSITIVE]
    if operation.body:  # nothing else can be wrong
        modes.append(schemathesis.GenerationMode.NEGATIVE)
    for mode in modes:

        @settings(FEW, max_examples=n, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def run(case: Any) -> None:
            if isinstance(case.body, dict) and "input" not in case.body:
                case.body |= {"max_tokens": 2}  # this is about answers, not about long ones
                case.body.pop("max_completion_tokens", None)
            response = case.call(timeout=60)
            statuses[response.status_code] += 1
            assert response.status_code < 500, (case.as_curl_command(), response.text)
            case.validate_response(response, checks=[schemathesis.checks.not_a_server_error])

        run()
    return statuses


class TestStrictJson:
    """The parser alone, against Python's."""

    text = st.text(st.characters(codec="utf-8"))
    values = st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(10**18), 10**18)
        | text
        | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner, max_size=4),
        max_leaves=6,
    )

    @settings(FEW, max_examples=100)
    @given(value=st.dictionaries(text, values, max_size=4), plain=st.booleans())
    def test_what_python_writes_is_read_back(self, value: dict[str, Any], plain: bool) -> None:
        assert parse_object(json.dumps(value, ensure_ascii=plain).encode()) == value

    @settings(FEW, max_examples=500)
    @given(body=st.binary() | st.text().map(lambda t: t.encode("utf-8", "surrogatepass")))
    def test_anything_else_is_refused_and_nothing_else_raised(self, body: bytes) -> None:
        value: dict[str, Any] = {}
        with suppress(ApiError):
            value = parse_object(body)
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()

    @pytest.mark.parametrize("kind", ["[", '{"a":'])
    def test_the_depth_is_counted(self, kind: str) -> None:
        def nested(depth: int) -> bytes:
            end = "]" if kind == "[" else "}"
            return ('{"a":' + kind * depth + "1" + end * depth + "}").encode()

        assert parse_object(nested(MAX_DEPTH - 2))
        for depth in (MAX_DEPTH + 1, 10**5):
            with pytest.raises(ApiError, match="deeper"):
                parse_object(nested(depth))
