"""How an answer goes out: in one piece, or as a stream of server-sent events."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from pyper.generate import Event
from pyper.serve.answers import LAST_EVENT, server_sent, to_json
from pyper.serve.api_error import ApiError
from pyper.serve.engine_thread import EngineThread
from pyper.serve.service import Begun

Result = TypeVar("Result")
_CHUNKS_PER_SECOND = 2000
"""Of all streams together; one stream alone gets every token by itself, up to that many."""


class JsonResponse(Response):
    """ASCII JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The object's text."""
        return to_json(content)


class EventStream(StreamingResponse):
    """Server-sent events; whatever ends the response also ends the writing."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], release: Callable[[], None]) -> None:
        super().__init__(events, headers={"x-accel-buffering": "no"})
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send; the client may leave at any moment."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._release()


async def reply_whole(request: Request, begun: Begun, engine: EngineThread) -> Response:
    """Wait for all sequences; stop writing when the client goes away."""
    try:
        choices = await unless_disconnected(request, _collect(begun))
    finally:
        engine.cancel(begun.generation)
    return JsonResponse(begun.answer.whole(choices, begun.usage))


async def _collect(begun: Begun) -> list[list[Event]]:
    choices: list[list[Event]] = [[] for _ in range(begun.n_choices)]
    async for part in begun.generation.parts():
        for index, events in part:
            choices[index] += events
            begun.usage.count(events)
    return choices


def reply_in_parts(begun: Begun, engine: EngineThread, *, with_usage: bool) -> Response:
    """A chunk for every step of the engine, or for several when the client is slower."""
    return EventStream(
        _chunks(begun, engine, with_usage=with_usage), lambda: engine.cancel(begun.generation)
    )


async def _chunks(begun: Begun, engine: EngineThread, *, with_usage: bool) -> AsyncIterator[bytes]:
    answer = begun.answer
    if opening := answer.opening(begun.n_choices):
        yield server_sent(answer.chunk(opening))
    try:
        async for part in begun.generation.parts():
            for _, events in part:
                begun.usage.count(events)
            choices = [answer.part(index, events) for index, events in part]
            yield server_sent(answer.chunk(choices))
            # Never without a pause: a stream whose events are all there would not let go of the
            # loop. With many streams a longer one, so that writing chunks does not slow the engine.
            await asyncio.sleep(engine.stats.running / _CHUNKS_PER_SECOND)
    except ApiError as error:  # the status is out already
        yield server_sent(error.body())
        return
    if with_usage:
        yield server_sent(answer.chunk([], begun.usage))
    yield LAST_EVENT


async def unless_disconnected(request: Request, work: Awaitable[Result]) -> Result:
    """The result of `work`; it is cancelled, and ClientDisconnect raised, when nobody waits."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
