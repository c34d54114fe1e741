"""The one thread that owns the engine.

Commands reach it through a queue, events return through `loop.call_soon_threadsafe`; nothing else
is shared. What the thread alone may touch begins with `_on_thread`.
"""

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from pyper.errors import PyperError
from pyper.generate import BatchEngine, EngineStats, Event, Request
from pyper.serve.api_error import ApiError, bad_request, overloaded
from pyper.serve.generation import Generation

log = logging.getLogger("pyper.serve")
Result = TypeVar("Result")
_LAST_STEP_SECONDS = 5.0


class EngineThread:
    """Runs `engine.step()` in a loop. Its public methods belong to the event loop's thread."""

    def __init__(self, engine: BatchEngine, *, max_waiting: int) -> None:
        self._engine = engine
        self._capacity = engine.limits.max_running + max_waiting
        self._n_reserved = 0
        self._generations: dict[int, Generation] = {}
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._jobs: deque[Callable[[], None]] = deque()
        self._alive: set[int] = set()
        self._thread = threading.Thread(target=self._on_thread_run, name="engine", daemon=True)
        self.stats: EngineStats = engine.stats()
        """As of the last step."""
        self.observe: Callable[[Sequence[Event]], None] = lambda events: None
        """Called with the events of every step."""
        self.observe_first: Callable[[float], None] = lambda seconds: None
        """Called with the time that a request waited for its first token."""

    def start(self) -> None:
        """Begin; call it on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End after the step that is running, or leave it behind when it takes too long."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join, _LAST_STEP_SECONDS)

    # Requests

    async def submit(self, requests: Sequence[Request]) -> Generation:
        """Hand sequences to the engine. Raises PromptError; ApiError 429 when too many wait, 400
        when there could never be room.
        """
        self._reserve(len(requests))
        generation = Generation(len(requests))
        accepted = self._loop.create_future()
        self._commands.put(lambda: self._on_thread_submit(generation, requests, accepted))
        try:
            await accepted
        except BaseException:
            self.cancel(generation)
            raise
        return generation

    def cancel(self, generation: Generation) -> None:
        """Stop what is left of it, within one token. Harmless when nothing is."""
        if generation.cancelled:
            return
        generation.cancelled = True
        self._n_reserved -= generation.n_open
        generation.n_open = 0
        self._cancel_ids(generation.ids)

    async def call(self, functions: Sequence[Callable[[], Result]]) -> list[Result]:
        """Run something else on the engine's thread, one function after each step.

        All of them take one place; the results, in order. Raises ApiError 429, and what they raise.
        """
        self._reserve(1)
        try:
            return [await self._call(function) for function in functions]
        finally:
            self._n_reserved -= 1

    async def _call(self, function: Callable[[], Result]) -> Result:
        done: asyncio.Future[Result] = self._loop.create_future()
        job = partial(self._on_thread_call, function, done)
        self._commands.put(lambda: self._jobs.append(job))
        return await done

    def _reserve(self, n: int) -> None:
        if n > self._capacity:
            raise bad_request(
                f"{n} sequences in one request; this server has {self._capacity} places"
            )
        if self._n_reserved + n > self._capacity:
            raise overloaded()
        self._n_reserved += n

    def fail_all(self, error: ApiError) -> None:
        """End everything that runs or waits with an error."""
        for generation in {id(g): g for g in self._generations.values()}.values():
            self.cancel(generation)
            generation.fail(error)

    @property
    def n_waiting(self) -> int:
        """Sequences that were accepted and are not being written yet."""
        return max(0, self._n_reserved - self.stats.running)

    @property
    def is_alive(self) -> bool:
        """Whether requests can be answered."""
        return self._thread.is_alive()

    # On the event loop, called from the thread

    def _accept(
        self, generation: Generation, ids: tuple[int, ...], accepted: "asyncio.Future[None]"
    ) -> None:
        generation.ids = ids
        if generation.cancelled:
            self._cancel_ids(ids)
            return
        self._generations |= dict.fromkeys(ids, generation)
        if not accepted.done():
            accepted.set_result(None)

    def _deliver(self, events: Sequence[Event]) -> None:
        self.observe(events)
        for event in events:
            generation = self._generations.get(event.request_id)
            if generation is None:  # cancelled while this step ran
                continue
            if not generation.has_begun_to_write:
                self.observe_first(time.perf_counter() - generation.began)
            generation.push(event)
            if event.finished is not None:
                del self._generations[event.request_id]
                self._n_reserved -= 1

    def _cancel_ids(self, ids: Sequence[int]) -> None:
        for request_id in ids:
            self._generations.pop(request_id, None)
        self._commands.put(lambda: self._on_thread_cancel(ids))

    # On the thread

    def _on_thread_run(self) -> None:
        try:
            while self._on_thread_obey():
                if self._jobs:
                    self._jobs.popleft()()
                if not self._engine.idle:
                    self._on_thread_step()
                self.stats = self._engine.stats()
        except RuntimeError:
            if not self._loop.is_closed():  # the second Ctrl-C closes it under us
                raise

    def _on_thread_obey(self) -> bool:
        """Do what was commanded; wait for it when there is nothing else to do. False: stop."""
        may_wait = self._engine.idle and not self._jobs
        while True:
            try:
                command = self._commands.get(block=may_wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            may_wait = False

    def _on_thread_step(self) -> None:
        try:
            events = self._engine.step()
        except Exception:
            log.exception("the engine failed; its requests are lost, it goes on with new ones")
            self._on_thread_cancel(list(self._alive))
            self._post(self.fail_all, ApiError(500, "the model failed on this request"))
            return
        self._alive -= {event.request_id for event in events if event.finished is not None}
        if events:
            self._post(self._deliver, events)

    def _on_thread_submit(
        self,
        generation: Generation,
        requests: Sequence[Request],
        accepted: "asyncio.Future[None]",
    ) -> None:
        ids: list[int] = []
        try:
            for request in requests:
                ids.append(self._engine.submit(request))
            self._alive |= set(ids)
        except PyperError as error:
            self._on_thread_cancel(ids)
            self._post(_refuse, accepted, error)
            return
        self._post(self._accept, generation, tuple(ids), accepted)

    def _on_thread_cancel(self, ids: Sequence[int]) -> None:
        for request_id in ids:
            self._engine.cancel(request_id)
        self._alive -= set(ids)

    def _on_thread_call(
        self, function: Callable[[], Result], done: "asyncio.Future[Result]"
    ) -> None:
        if done.cancelled():  # nobody waits for it any more
            return
        try:
            result = function()
        except Exception as error:
            self._post(_refuse, done, error)
        else:
            self._post(_settle, done, result)

    def _post(self, function: Callable[..., None], *arguments: object) -> None:
        self._loop.call_soon_threadsafe(function, *arguments)


def _refuse(future: "asyncio.Future[Result]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _settle(future: "asyncio.Future[Result]", result: Result) -> None:
    if not future.done():
        future.set_result(result)
