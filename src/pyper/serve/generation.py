"""The sequences of one HTTP request, on the event loop's side."""

import asyncio
import time
from collections.abc import AsyncIterator
from itertools import groupby

from pyper.generate import Event
from pyper.serve.api_error import ApiError


class Generation:
    """Collects the events of its sequences until they are asked for. Only for the event loop."""

    def __init__(self, n_sequences: int) -> None:
        self.n_open = n_sequences
        """Sequences that are still being written."""
        self.ids: tuple[int, ...] = ()
        """The engine's numbers, in order; empty until it has accepted them."""
        self.cancelled = False
        self.began = time.perf_counter()
        self.has_begun_to_write = False
        self._events: list[tuple[int, Event]] = []
        self._error: ApiError | None = None
        self._changed = asyncio.Event()

    def push(self, event: Event) -> None:
        """One more event of one of the sequences."""
        self.has_begun_to_write = True
        self._events.append((self.ids.index(event.request_id), event))
        if event.finished is not None:
            self.n_open -= 1
        self._changed.set()

    def fail(self, error: ApiError) -> None:
        """Nothing more will come."""
        self._error, self.n_open = error, 0
        self._changed.set()

    async def parts(self) -> AsyncIterator[list[tuple[int, list[Event]]]]:
        """Whatever came since the last time, by sequence, until all have ended.

        A slow client gets few large parts, a fast one a part per token. Raises ApiError when the
        engine fails.
        """
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._error is not None:
                raise self._error
            events, self._events = self._events, []
            ended = self.n_open == 0
            if events:
                events.sort(key=lambda pair: pair[0])
                yield [
                    (index, [event for _, event in group])
                    for index, group in groupby(events, key=lambda pair: pair[0])
                ]
            if ended:
                return
