"""HTTP by hand: what no client library would send."""

import json
import socket
from dataclasses import dataclass
from typing import Any

from serve.small_server import Server


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The error, whose shape is checked."""
        error = json.loads(self.body)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert error["message"]
        return dict(error)


def head(server: Server, path: str = "/v1/completions", *lines: str, method: str = "POST") -> bytes:
    """A request's head without its last line end; `lines` may replace the usual ones."""
    given = {line.split(":", 1)[0].lower() for line in lines}
    usual = [f"Host: 127.0.0.1:{server.port}", "Content-Type: application/json"]
    kept = [line for line in usual if line.split(":", 1)[0].lower() not in given]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *kept, *lines, ""]).encode("latin-1")


def request(server: Server, body: bytes, path: str = "/v1/completions", *lines: str) -> bytes:
    return head(server, path, *lines, f"Content-Length: {len(body)}") + b"\r\n" + body


def receive(connection: socket.socket) -> Reply:
    """One whole answer."""
    received = b""
    while not received.endswith(b"\r\n\r\n"):  # byte by byte: another answer may follow
        byte = connection.recv(1)
        assert byte, f"closed without an answer after {received!r}"
        received += byte
    status_line, *lines = received.decode("latin-1").rstrip().split("\r\n")
    headers = {k.lower(): v.strip() for k, v in (line.split(":", 1) for line in lines)}
    body = b""
    while missing := int(headers.get("content-length", 0)) - len(body):
        part = connection.recv(missing)
        assert part
        body += part
    return Reply(int(status_line.split()[1]), headers, body)


def exchange(server: Server, sent: bytes) -> Reply:
    with server.connect() as connection:
        connection.sendall(sent)
        return receive(connection)


def post(server: Server, body: bytes, path: str = "/v1/completions", *lines: str) -> Reply:
    return exchange(server, request(server, body, path, *lines))


def is_closed(connection: socket.socket, seconds: float) -> bool:
    """Whether the server ends the connection within that time."""
    connection.settimeout(seconds)
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


def read_to_the_end(connection: socket.socket) -> bytes:
    """Everything until the server ends the connection, one way or another."""
    received = b""
    try:
        while part := connection.recv(65536):
            received += part
    except ConnectionError:
        pass
    return received
