"""What every request must pass before the app sees it: host, length, key."""

import hmac
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from pyper.serve.answers import to_json
from pyper.serve.api_error import ApiError, bad_request
from pyper.serve.settings import ServeSettings, is_loopback

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Count = Callable[[str, int, float], None]

PAGE = ("/", "/page.js", "/page.css")
OPEN = (*PAGE, "/health")
"""What can be had without the key: nothing of the model's."""
KNOWN = (
    *OPEN,
    "/metrics",
    "/openapi.json",
    "/v1/models",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/embeddings",
)

_HOST = re.compile(r"(?P<name>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_ADDRESS = re.compile(r"[0-9.]+|\[[0-9A-Fa-f:.]+\]")
_LOOPBACK_NAMES = {"localhost", "127.0.0.1", "[::1]"}
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src data:; object-src 'none'; base-uri 'none'; "
        b"form-action 'none'; frame-ancestors 'none'",
    ),
]


class Guard:
    """ASGI middleware. Decides by `scope["path"]`, never by a URL built from the Host header."""

    def __init__(self, app: App, settings: ServeSettings, count: Count) -> None:
        self._app, self._count = app, count
        self._key = None if settings.api_key is None else settings.api_key.encode()
        self._only_local = is_loopback(settings.host)
        self._hosts = {
            h.lower() for h in (*_LOOPBACK_NAMES, settings.host, *settings.allowed_hosts)
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, pass on, count."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0
        if scope["method"] == "HEAD":  # what watches a server asks so; uvicorn leaves out the body
            scope = {**scope, "method": "GET"}

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        try:
            self._check(scope)
        except ApiError as error:
            await _answer(error, send_and_note)
        else:
            await self._app(scope, receive, send_and_note)
        finally:
            path = scope["path"] if scope["path"] in KNOWN else "other"
            # Without a status nobody was left to answer.
            self._count(path, status or 499, time.perf_counter() - began)

    def _check(self, scope: Scope) -> None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        names = [name for name, _ in headers]
        if b"content-length" in names and b"transfer-encoding" in names:
            raise ApiError(
                400,
                "Content-Length and Transfer-Encoding exclude each other",
                headers={"connection": "close"},  # who knows what the rest of it is
            )
        self._check_host([value for name, value in headers if name == b"host"])
        if self._key is not None and scope["path"] not in OPEN:
            self._check_key([value for name, value in headers if name == b"authorization"])

    def _check_host(self, hosts: list[bytes]) -> None:
        """Against pages of other sites whose name was made to point here (DNS rebinding)."""
        host = _HOST.fullmatch(hosts[0].decode("latin-1")) if len(hosts) == 1 else None
        if host is None:
            raise bad_request("there must be one Host header: a name or an address, and a port")
        name = host["name"].lower()[:80]
        # An address cannot be rebound, and a server for other machines has many.
        if name in self._hosts or (not self._only_local and _ADDRESS.fullmatch(name)):
            return
        raise ApiError(
            403,
            f"this server is not known as {name}; `--allow-host {name}` changes that",
            code="unknown_host",
        )

    def _check_key(self, values: list[bytes]) -> None:
        given = values[0].strip() if len(values) == 1 else b""
        kind, _, key = given.partition(b" ")
        # Both branches take the same time; which bytes differ cannot be learnt from it.
        right = hmac.compare_digest(key.strip(), self._key or b"")
        if kind.lower() == b"bearer" and right:
            return
        raise ApiError(
            401,
            "the API key is missing or wrong: send `Authorization: Bearer KEY`",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )


async def _answer(error: ApiError, send: Send) -> None:
    body = to_json(error.body())
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *((name.encode(), value.encode()) for name, value in error.headers.items()),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
