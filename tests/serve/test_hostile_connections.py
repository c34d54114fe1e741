"""Heads, bodies and pauses that no honest client sends; the server goes on, and keeps nothing."""

import time
from typing import Any

import pytest

from serve.raw_http import exchange, head, is_closed, post, receive, request
from serve.small_requests import chat, completion
from serve.small_server import KEY, Server


class TestHeads:
    """What stands before the body."""

    def test_a_large_head_is_refused_whole_or_in_parts(self, server: Server) -> None:
        large = head(server, "/health", "X-Large: " + "a" * 20_000, method="GET") + b"\r\n"
        assert exchange(server, large).status == 431
        with server.connect() as connection:
            connection.sendall(head(server, "/health", method="GET") + b"X-Large: ")
            for _ in range(20):
                connection.sendall(b"a" * 1000)
            reply = receive(connection)
        assert reply.status == 431
        assert reply.error["type"] == "invalid_request_error"

    def test_200_mb_of_header_are_refused_and_not_kept(self, server: Server) -> None:
        before = resident_bytes(server)
        with server.connect() as connection:
            connection.sendall(head(server, "/health", method="GET") + b"X-Large: ")
            send_megabytes(connection, 200)
            assert receive(connection).status == 431
        assert resident_bytes(server) - before < 20e6

    @pytest.mark.parametrize(
        ("lines", "status"),
        [
            (["Host: evil.example"], 403),
            (["Host: evil.example:80"], 403),
            (["Host: 192.168.7.7"], 403),
            (["Host: x/y?"], 400),
            (["Host: 127.0.0.1/v1/models?"], 400),
            (["Host: user@127.0.0.1"], 400),
            (["Host: "], 400),
            (["Host: 127.0.0.1", "Host: evil.example"], 400),
            (["Host: localhost:1"], 200),
            (["Host: [::1]:80"], 200),
        ],
    )
    def test_only_known_hosts_are_answered(
        self, server: Server, lines: list[str], status: int
    ) -> None:
        reply = exchange(server, head(server, "/v1/models", *lines, method="GET") + b"\r\n")
        assert reply.status == status

    def test_there_must_be_a_host(self, server: Server) -> None:
        assert exchange(server, b"GET /v1/models HTTP/1.1\r\n\r\n").status == 400
        assert exchange(server, b"GET /v1/models HTTP/1.0\r\n\r\n").status == 400

    @pytest.mark.parametrize(
        "lines",
        [
            ["Content-Length: 5", "Content-Length: 6"],
            ["Content-Length: 5", "content-length: 5"],
            ["Content-Length: 5, 6"],
            ["Content-Length: 5", "Transfer-Encoding: chunked"],
            ["Transfer-Encoding: chunked", "Content-Length: 5"],
            ["Content-Length: -5"],
            ["Content-Length: 0x5"],
            ["Content-Length: " + "9" * 40],
            ["Transfer-Encoding: gzip, chunked"],
            ["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"],
            ["X Y: 1"],
            ["X: a\x00b"],
        ],
        ids=str,
    )
    def test_lengths_that_disagree_are_refused_and_the_connection_ends(
        self, server: Server, lines: list[str]
    ) -> None:
        smuggled = b"0\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with server.connect() as connection:
            connection.sendall(head(server, "/v1/completions", *lines) + b"\r\n" + smuggled)
            reply = receive(connection)
            assert reply.status == 400
            assert reply.error["type"] == "invalid_request_error"
            connection.settimeout(10)
            assert b"HTTP" not in connection.recv(65536)

    @pytest.mark.parametrize(
        "line", [b"\x16\x03\x01\x02\x00\x01\x00", b"PRI * HTTP/2.0", b"GET", b"GET / HTTP/9.9"]
    )
    def test_what_is_not_http_is_refused(self, server: Server, line: bytes) -> None:
        assert exchange(server, line + b"\r\n\r\n").status == 400

    @pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "X"])
    def test_a_wrong_method_is_named(self, server: Server, method: str) -> None:
        reply = exchange(server, head(server, method=method) + b"\r\n")
        assert (reply.status, reply.headers["allow"]) == (405, "POST")
        assert reply.error["message"]
        assert "access-control-allow-origin" not in reply.headers

    @pytest.mark.parametrize(
        "lines",
        [
            ["Content-Type: text/plain"],
            ["Content-Type: application/x-www-form-urlencoded"],
            ["Content-Type: multipart/form-data; boundary=x"],
            ["Content-Type: application/json; charset=utf-16"],
            ["Content-Type: "],
            ["Content-Encoding: gzip"],
        ],
        ids=str,
    )
    def test_a_body_of_another_type_is_refused(self, server: Server, lines: list[str]) -> None:
        assert post(server, completion(), "/v1/completions", *lines).status == 415

    @pytest.mark.parametrize(
        "path",
        ["/nothing", "/v1/completions/", "//health", "/../etc/passwd", "/page/../health", "/docs"],
    )
    def test_unknown_paths_are_not_found(self, server: Server, path: str) -> None:
        reply = exchange(server, head(server, path, method="GET") + b"\r\n")
        assert reply.status == 404
        assert reply.error["message"]


class TestBodies:
    """How a body arrives."""

    def test_a_declared_length_over_the_limit_is_refused_before_it_is_sent(
        self, server: Server
    ) -> None:
        with server.connect() as connection:
            connection.sendall(
                head(server, "/v1/completions", f"Content-Length: {200 * 2**20}") + b"\r\n"
            )
            reply = receive(connection)
        assert reply.status == 413
        assert "1,048,576" in reply.error["message"]

    @pytest.mark.parametrize("chunked", [False, True])
    def test_200_mb_are_refused_and_not_kept(self, server: Server, chunked: bool) -> None:
        before = resident_bytes(server)
        how = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {200 * 2**20}"
        with server.connect() as connection:
            connection.sendall(head(server, "/v1/completions", how) + b"\r\n")
            if chunked:
                connection.sendall(f"{200 * 2**20:x}\r\n".encode())
            send_megabytes(connection, 200)
            assert receive(connection).status == 413
        assert resident_bytes(server) - before < 20e6

    def test_a_body_of_the_largest_size_is_read(self, server: Server) -> None:
        body = completion()
        padded = body + b" " * (2**20 - len(body))
        assert post(server, padded).status == 200
        assert post(server, padded + b" ").status == 413

    def test_a_chunk_that_makes_no_sense_is_refused(self, server: Server) -> None:
        start = head(server, "/v1/completions", "Transfer-Encoding: chunked") + b"\r\n"
        reply = exchange(server, start + b"zz\r\n" + completion())
        assert reply.status == 400

    def test_a_body_may_come_byte_by_byte(self, server: Server) -> None:
        with server.connect() as connection:
            for byte in request(server, completion()):
                connection.sendall(bytes([byte]))
            assert receive(connection).status == 200

    def test_requests_in_a_row_on_one_connection_are_answered_in_order(
        self, server: Server
    ) -> None:
        with server.connect() as connection:
            wrong = request(server, completion(n=0))
            connection.sendall(request(server, completion()) + wrong + request(server, chat()))
            assert [receive(connection).status for _ in range(3)] == [200, 400, 400]


class TestPatience:
    """Connections that take their time; the hasty server waits for 0.6 s, not for 10 or 30."""

    @pytest.mark.parametrize(
        "sent", [b"", b"POST /v1/comp", b"GET / HTTP/1.1\r\nHost: localhost\r\n"]
    )
    def test_a_head_that_does_not_end_is_not_waited_for(
        self, hasty_server: Server, sent: bytes
    ) -> None:
        with hasty_server.connect() as connection:
            connection.sendall(sent)
            began = time.monotonic()
            if sent:
                assert receive(connection).status == 408
            assert is_closed(connection, 8)
            assert 0.4 < time.monotonic() - began < 7

    def test_the_second_head_on_a_connection_is_not_waited_for_either(
        self, hasty_server: Server
    ) -> None:
        with hasty_server.connect() as connection:
            whole = head(hasty_server, "/health", method="GET") + b"\r\n"
            connection.sendall(whole + whole[:-4])
            assert receive(connection).status == 200
            assert receive(connection).status == 408

    def test_a_head_that_drips_is_not_waited_for(self, hasty_server: Server) -> None:
        with hasty_server.connect() as connection, pytest.raises(ConnectionError):
            drip(connection, seconds=5)

    @pytest.mark.parametrize("n_sent", [0, 5])
    def test_a_body_that_does_not_end_is_answered_408(
        self, hasty_server: Server, n_sent: int
    ) -> None:
        key = f"Authorization: Bearer {KEY}"
        body = completion()
        whole = request(hasty_server, body, "/v1/completions", key)
        with hasty_server.connect() as connection:
            connection.sendall(whole[: len(whole) - len(body) + n_sent])
            reply = receive(connection)
            assert reply.status == 408
            assert reply.error["message"]
            assert is_closed(connection, 3)

    def test_an_idle_connection_between_requests_is_closed(self, hasty_server: Server) -> None:
        with hasty_server.connect() as connection:
            connection.sendall(head(hasty_server, "/health", method="GET") + b"\r\n")
            assert receive(connection).status == 200
            assert is_closed(connection, 4)

    def test_a_refused_body_is_not_read_for_ever(self, hasty_server: Server) -> None:
        with hasty_server.connect() as connection:
            connection.sendall(
                head(hasty_server, "/v1/completions", f"Content-Length: {2**30}") + b"\r\n"
            )
            assert receive(connection).status == 401
            with pytest.raises(ConnectionError):
                drip(connection, seconds=5)


def resident_bytes(server: Server) -> float:
    return server.metric("process_resident_memory_bytes")


def drip(connection: Any, seconds: float) -> None:
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        connection.sendall(b"a")
        time.sleep(0.05)


def send_megabytes(connection: Any, n: int) -> None:
    block = b"a" * 2**20
    for _ in range(n):
        connection.sendall(block)
