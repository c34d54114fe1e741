"""One connection, with the limits that uvicorn leaves to a proxy.

A head that is too large or too slow, a body that nobody wants, a client that does not read what it
asked for: each is given its time, an answer where one can still be read, and an end.
"""

import asyncio
import re
import socket
import sys
from typing import Any

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from pyper.serve.answers import to_json
from pyper.serve.api_error import error_body
from pyper.serve.settings import Limits

_SEND_BUFFER = 256 << 10
"""Bytes the system holds for a client; by default 4 MB would hide that nobody reads."""
_END_OF_HEAD = re.compile(rb"\n\r?\n")
_LENGTH = re.compile(rb"^content-length[ \t]*:", re.IGNORECASE | re.MULTILINE)


def protocol_with(limits: Limits) -> type[H11Protocol]:
    """uvicorn makes the protocols itself and knows nothing of these limits."""

    class Bound(LimitedProtocol):
        limits_of_this_server = limits

    return Bound


class LimitedProtocol(H11Protocol):
    """uvicorn's protocol on h11, and timers."""

    limits_of_this_server = Limits()

    def __init__(self, config: Config, *arguments: Any, **named: Any) -> None:
        super().__init__(config, *arguments, **named)
        self._limits = self.limits_of_this_server
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._discard_timer: asyncio.TimerHandle | None = None
        self._lingering = False

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins: the first head is due."""
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        if connection is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends; so do the timers."""
        for timer in (self._head_timer, self._stall_timer, self._discard_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes came; those after a refusal are thrown away."""
        if self._lingering:
            return
        super().data_received(data)

    def shutdown(self) -> None:
        """The server stops."""
        if self._lingering:
            self.transport.abort()
        else:
            super().shutdown()

    # Heads

    def handle_events(self) -> None:
        """Look at a head before h11 does; know when it is complete."""
        if self.conn.their_state is h11.IDLE and not self._head_is_fine():
            return
        super().handle_events()
        if self.conn.their_state is not h11.IDLE:
            self._stop_awaiting_head()

    def _head_is_fine(self) -> bool:
        received, _ = self.conn.trailing_data
        if received and self._head_timer is None:
            self._await_head()
        end = _END_OF_HEAD.search(received)
        head = received if end is None else received[: end.end()]
        if len(head) > self._limits.header_bytes:
            self._refuse(431, f"the header is larger than {self._limits.header_bytes:,} bytes")
            return False
        if end is not None and len(_LENGTH.findall(head)) > 1:
            self._refuse(400, "there is more than one Content-Length")
            return False
        return True

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self._limits.header_seconds, self._head_is_late)

    def _stop_awaiting_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        if self.conn.trailing_data[0]:
            self._refuse(408, "the header did not arrive in time")
        else:
            self.transport.abort()

    # Refusals

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn while it handles h11's complaint, which knows the better status."""
        complaint = sys.exception()
        status = getattr(complaint, "error_status_hint", 400)
        self._refuse(status if status < 500 else 400, f"this is not HTTP: {complaint or msg}")

    def _refuse(self, status: int, message: str) -> None:
        """Answer, stop listening, give the client time to read."""
        self._stop_awaiting_head()
        if self.cycle is not None and not self.cycle.response_complete:
            if self.cycle.response_started:
                self.transport.abort()
                return
            # The app waits for the rest of a body that makes no sense; for it the client is gone.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        body = to_json(error_body(status, message))
        head = (
            f"HTTP/1.1 {status} {STATUS_PHRASES[status].decode()}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self._linger()

    def _linger(self) -> None:
        self._lingering = True
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._discard_timer = self.loop.call_later(
            self._limits.linger_seconds, self.transport.abort
        )

    # Answers

    def pause_writing(self) -> None:
        """The client does not read."""
        super().pause_writing()
        self._watch_stall()

    def resume_writing(self) -> None:
        """It does again."""
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _watch_stall(self) -> None:
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(
                self._limits.stall_seconds, self.transport.abort
            )

    def on_response_complete(self) -> None:
        """An answer was written, though perhaps neither read nor its request's body received."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY and not self._lingering:
            self._discard_timer = self.loop.call_later(
                self._limits.linger_seconds, self._body_goes_on
            )
        if self.transport.get_write_buffer_size() > 0:
            self.loop.call_later(self._limits.stall_seconds, self._answer_was_read)

    def _body_goes_on(self) -> None:
        answered = self.conn.our_state in (h11.DONE, h11.MUST_CLOSE)
        if answered and self.conn.their_state is h11.SEND_BODY:
            self.transport.abort()

    def _answer_was_read(self) -> None:
        if self.transport.is_closing() and self.transport.get_write_buffer_size() > 0:
            self.transport.abort()
