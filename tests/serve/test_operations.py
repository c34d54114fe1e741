"""Keys, places in the queue, slow readers, health, metrics, and the end."""

import json
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serve.raw_http import exchange, head, post, read_to_the_end, receive, request
from serve.small_server import CONTEXT, KEY, Server, serving, wait_until

LONG = {"model": "tiny", "prompt": "a", "max_tokens": CONTEXT - 10, "temperature": 0}
# greedy: one draw in a hundred would end the text before its last token
SHORT = {"model": "tiny", "prompt": "a", "max_tokens": 3, "temperature": 0}
AUTHORISED = {"Authorization": f"Bearer {KEY}"}


def begin_stream(server: Server, body: dict[str, Any]) -> socket.socket:
    """A stream that nobody reads; its head has arrived."""
    connection = server.connect()
    key = f"Authorization: Bearer {KEY}"
    sent = json.dumps(body | {"stream": True}).encode()
    connection.sendall(request(server, sent, "/v1/completions", key))
    assert receive(connection).status == 200
    return connection


class TestKey:
    """`--api-key-file`, PYPER_API_KEY."""

    @pytest.mark.parametrize(
        "lines",
        [
            [],
            ["Authorization: "],
            ["Authorization: Bearer"],
            ["Authorization: Bearer "],
            ["Authorization: Bearer wrong"],
            [f"Authorization: Bearer {KEY}x"],
            [f"Authorization: Bearer {KEY[:-1]}"],
            [f"Authorization: Basic {KEY}"],
            [f"Authorization: {KEY}"],
            ["Authorization: Bearer \xff\xfe"],
            [f"Authorization: Bearer {KEY}", f"Authorization: Bearer {KEY}"],
            [f"X-Api-Key: {KEY}"],
        ],
        ids=str,
    )
    def test_without_the_key_there_is_no_answer(
        self, hasty_server: Server, lines: list[str]
    ) -> None:
        reply = post(hasty_server, json.dumps(SHORT).encode(), "/v1/completions", *lines)
        assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
        assert reply.headers["www-authenticate"] == "Bearer"

    @pytest.mark.parametrize(
        "path",
        ["/v1/models", "/metrics", "/openapi.json", "/nothing", "/v1/models/..%2f..%2fhealth",
         "/health/", "//health", "/v1/models?/health", "/page.js/../v1/models"],
    )  # fmt: skip
    def test_the_key_opens_everything_but_page_and_health(
        self, hasty_server: Server, path: str
    ) -> None:
        assert (
            exchange(hasty_server, head(hasty_server, path, method="GET") + b"\r\n").status == 401
        )

    @pytest.mark.parametrize("path", ["/", "/page.js", "/page.css", "/health"])
    def test_page_and_health_need_no_key(self, hasty_server: Server, path: str) -> None:
        assert hasty_server.get(path).status_code == 200

    def test_the_official_client_sends_it(self, hasty_server: Server) -> None:
        url = f"{hasty_server.url}/v1"
        with openai.OpenAI(base_url=url, api_key=KEY) as client:
            assert client.models.list().data[0].id == "tiny"
        with (
            openai.OpenAI(base_url=url, api_key="wrong") as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()

    def test_it_is_never_printed_or_shown(self, hasty_server: Server) -> None:
        shown = [hasty_server.get(p, headers=AUTHORISED).text for p in ("/metrics", "/v1/models")]
        assert KEY not in "".join([*shown, *hasty_server.printed])


class TestQueue:
    """Two are written, two wait, the fifth is sent away."""

    def test_one_too_many_is_told_when_to_come_back(self, hasty_server: Server) -> None:
        streams = [begin_stream(hasty_server, LONG) for _ in range(4)]
        try:
            wait_until(lambda: hasty_server.health()["waiting"] == 2)
            assert hasty_server.health()["running"] == 2
            reply = hasty_server.post("/v1/completions", SHORT, headers=AUTHORISED)
            assert reply.status_code == 429
            assert int(reply.headers["retry-after"]) >= 1
            assert reply.json()["error"]["type"] == "rate_limit_error"
        finally:
            for stream in streams:
                stream.close()
        hasty_server.wait_until_idle()
        reply = hasty_server.post("/v1/completions", SHORT, headers=AUTHORISED)
        assert reply.status_code == 200

    def test_a_request_for_more_than_there_is_room_for_is_refused(
        self, hasty_server: Server
    ) -> None:
        reply = hasty_server.post("/v1/completions", SHORT | {"n": 5}, headers=AUTHORISED)
        assert reply.status_code == 400
        assert "4 places" in reply.json()["error"]["message"]

    def test_the_official_client_comes_back_by_itself(self, hasty_server: Server) -> None:
        streams = [begin_stream(hasty_server, LONG) for _ in range(4)]
        threading.Timer(0.5, lambda: [stream.close() for stream in streams]).start()
        with openai.OpenAI(base_url=f"{hasty_server.url}/v1", api_key=KEY, max_retries=3) as client:
            assert client.completions.create(**SHORT).choices[0].text  # type: ignore[call-overload]


class TestReaders:
    """Clients that do not take what they asked for."""

    def test_one_who_does_not_read_is_dropped(self, hasty_server: Server) -> None:
        body = LONG | {"n": 2, "logprobs": 5, "stream": True}
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", hasty_server.port))
        key = f"Authorization: Bearer {KEY}"
        connection.sendall(request(hasty_server, json.dumps(body).encode(), "/v1/completions", key))
        with connection:
            wait_until(lambda: hasty_server.health()["running"] == 2)
            hasty_server.wait_until_idle(seconds=15)
            # What lies in the buffers can still be read; the end never came.
            assert b"[DONE]" not in read_to_the_end(connection)

    def test_the_others_go_on_meanwhile(self, hasty_server: Server) -> None:
        stalled = begin_stream(hasty_server, LONG | {"logprobs": 5})
        reply = hasty_server.post("/v1/completions", SHORT, headers=AUTHORISED)
        assert reply.status_code == 200
        stalled.close()
        hasty_server.wait_until_idle()

    def test_many_visits_leave_nothing_behind(self, server: Server) -> None:
        def visit(number: int) -> None:
            with server.connect() as connection:
                connection.sendall(request(server, json.dumps(LONG | {"stream": True}).encode()))
                if number % 2:
                    connection.recv(100)

        before = server.metric("process_open_fds")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(visit, range(100)))
        server.wait_until_idle()
        wait_until(lambda: server.metric("process_open_fds") <= before + 2)


class TestObserving:
    """/health and /metrics."""

    def test_health_says_what_runs(self, server: Server) -> None:
        assert server.health() == {"status": "ok", "model": "tiny", "running": 0, "waiting": 0}

    @pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/nothing"])
    def test_a_head_is_that_of_the_whole(self, server: Server, path: str) -> None:
        whole, head_alone = server.get(path), server.client.head(path)
        assert head_alone.status_code == whole.status_code
        assert head_alone.headers["content-length"] == whole.headers["content-length"]
        assert head_alone.content == b""
        assert server.client.head("/v1/completions").status_code == 405

    def test_metrics_count_requests_and_tokens(self, server: Server) -> None:
        name = 'pyper_requests_total{path="/v1/completions",status="200"}'
        answered, decoded = server.metric(name), server.metric("pyper_decoded_tokens")
        by_expert = [
            server.metric(f'pyper_written_tokens_total{{expert="{e}"}}') for e in server.experts
        ]
        assert server.post("/v1/completions", SHORT).status_code == 200
        assert server.metric(name) == answered + 1
        # the answer may be out before the engine has counted its last step
        wait_until(lambda: server.metric("pyper_decoded_tokens") == decoded + 3)
        now = [server.metric(f'pyper_written_tokens_total{{expert="{e}"}}') for e in server.experts]
        assert sum(now) == sum(by_expert) + 3
        assert server.metric("pyper_first_token_seconds_count") > 0
        text = server.get("/metrics").text
        assert 'path="/v1/completions/' not in text

    def test_answers_forbid_what_a_page_of_another_site_could_do(self, server: Server) -> None:
        for path in ("/", "/health", "/v1/models", "/nothing"):
            headers = server.get(path, headers={"Origin": "https://evil.example"}).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert "default-src 'self'" in headers["content-security-policy"]
            assert "access-control-allow-origin" not in headers


class TestShutdown:
    """SIGTERM and Ctrl-C."""

    @pytest.mark.parametrize(
        ("number", "code"),
        [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
    )
    def test_what_runs_is_finished_first(
        self, small_mixture_folder: Path, number: int, code: int
    ) -> None:
        with serving(small_mixture_folder) as server, ThreadPoolExecutor(1) as pool:
            idle = server.connect()
            whole = pool.submit(server.post, "/v1/completions", LONG | {"max_tokens": 300})
            wait_until(lambda: server.health()["running"] == 1)
            server.process.send_signal(number)
            time.sleep(0.3)
            with pytest.raises(ConnectionRefusedError):
                server.connect()
            answer = whole.result(timeout=30).json()
            assert answer["usage"]["completion_tokens"] == 300
            assert server.process.wait(timeout=10) == code
            assert "Traceback" not in "".join(server.printed)
            idle.close()

    @pytest.mark.slow
    def test_a_second_ctrl_c_ends_at_once(self, small_mixture_folder: Path) -> None:
        with serving(small_mixture_folder) as server, server.connect() as connection:
            body = LONG | {"n": 16, "stream": True}
            connection.sendall(request(server, json.dumps(body).encode()))
            wait_until(lambda: server.health()["running"] > 0, seconds=15)
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.2)
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(timeout=10) == 130
            assert "Traceback" not in "".join(server.printed)
            assert b"shutting_down" in read_to_the_end(connection)

    def test_what_takes_too_long_is_told_so(self, small_mixture_folder: Path) -> None:
        with serving(small_mixture_folder, "--shutdown-seconds", "0.3") as server:
            url, parts = f"{server.url}/v1/completions", []
            with (
                ThreadPoolExecutor(1) as pool,
                httpx.stream("POST", url, json=LONG | {"stream": True}, timeout=30) as stream,
            ):
                whole = pool.submit(server.post, "/v1/completions", LONG)
                wait_until(lambda: server.health()["running"] == 2)
                began = time.monotonic()
                server.process.send_signal(signal.SIGTERM)
                parts = list(stream.iter_lines())
                assert whole.result().status_code == 503
            assert json.loads([p for p in parts if p][-1].removeprefix("data: "))["error"][
                "code"
            ] == ("shutting_down")
            assert server.process.wait(timeout=10) == 143
            assert time.monotonic() - began < 5
            assert "Traceback" not in "".join(server.printed)
