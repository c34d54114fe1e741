"""Listen, answer, stop."""

import asyncio
import logging
import signal
import socket
import sys
import time
from types import FrameType

import uvicorn

from pyper.data import TextTokenizer
from pyper.data.chat_template import ChatTemplate
from pyper.errors import ConfigError
from pyper.generate import BatchEngine, Drafter, EngineLimits
from pyper.mixture import Mixture
from pyper.serve.api_error import shutting_down
from pyper.serve.app import build_app
from pyper.serve.engine_thread import EngineThread
from pyper.serve.model_names import ModelNames
from pyper.serve.protocol import protocol_with
from pyper.serve.service import Service
from pyper.serve.settings import ServeSettings

_FAREWELL_SECONDS = 1.0
"""For clients to read that the server is going."""


def listen(settings: ServeSettings) -> socket.socket:
    """Take the address before the model is loaded. Raises ConfigError when it cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        # `create_server` adds what it tried to the system's words.
        why = str(error.strerror or error).partition(" (while")[0]
        raise ConfigError(
            f"cannot listen on {settings.host}:{settings.port}: {why}",
            hint="`--host` takes an address of this machine, `--port 0` a free port",
        ) from None


def url_of(listening: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_server(
    mixture: Mixture,
    tokenizer: TextTokenizer,
    template: ChatTemplate,
    settings: ServeSettings,
    engine_limits: EngineLimits,
    listening: socket.socket,
    drafter: Drafter | None = None,
) -> None:
    """Answer until SIGTERM or Ctrl-C; then finish what runs, and exit with 143 or 130.

    drafter: see `BatchEngine`.
    """
    limits = settings.limits
    writer = BatchEngine(mixture, tokenizer, engine_limits, drafter=drafter)
    engine = EngineThread(writer, max_waiting=limits.queue)
    names = ModelNames(
        settings.name, mixture.settings.experts, mixture.settings.seq_len, int(time.time())
    )
    service = Service(mixture, tokenizer, template, names, engine)
    config = uvicorn.Config(
        build_app(service, settings),
        http=protocol_with(limits),
        ws="none",
        lifespan="on",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=limits.header_bytes,
        timeout_keep_alive=limits.keep_alive_seconds,
        timeout_graceful_shutdown=int(limits.shutdown_seconds) + 5,
    )
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    # uvicorn finishes first and raises the signal again for whoever handled it before.
    signal.signal(signal.SIGTERM, _exit)
    _Server(config, engine, limits.shutdown_seconds).run(sockets=[listening])


class _Server(uvicorn.Server):
    """Ends requests properly that do not end in time, or at a second Ctrl-C."""

    def __init__(self, config: uvicorn.Config, engine: EngineThread, seconds: float) -> None:
        super().__init__(config)
        self._engine, self._seconds = engine, seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal; uvicorn would leave at the second one, with a traceback for each client."""
        if not self.should_exit:
            super().handle_exit(sig, frame)
        else:
            self._loop.call_soon_threadsafe(self._end_requests)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Signals are handled outside the loop, which has to be known there."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what runs, for as long as it may take."""
        self._loop.call_later(self._seconds, self._end_requests)
        await super().shutdown(sockets)

    def _end_requests(self) -> None:
        self._engine.fail_all(shutting_down())
        self._loop.call_later(_FAREWELL_SECONDS, self._end_connections)

    def _end_connections(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
