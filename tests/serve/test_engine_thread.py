"""The thread between the event loop and the engine, when things go wrong."""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mixture.small_mixtures import small_mixture
from pyper.data import TextTokenizer
from pyper.errors import PromptError
from pyper.generate import BatchEngine, EngineLimits, Event, Request, SamplingConfig
from pyper.serve.api_error import ApiError
from pyper.serve.engine_thread import EngineThread
from pyper.serve.generation import Generation

REQUEST = Request((0, 5, 6), SamplingConfig(max_new_tokens=8, temperature=0))


class Fragile(BatchEngine):
    """Fails in the steps that are named."""

    def __init__(self, *failing: int) -> None:
        limits = EngineLimits(max_running=2)
        super().__init__(small_mixture(vocab_size=257), TextTokenizer.bytes_only(), limits)
        self.failing, self.n_steps = failing, 0
        self.may_step = threading.Event()
        self.may_step.set()
        self.is_stepping = threading.Event()

    def step(self) -> list[Event]:
        self.is_stepping.set()
        self.may_step.wait()
        self.n_steps += 1
        if self.n_steps in self.failing:
            raise RuntimeError("out of luck")
        return super().step()


def with_thread(engine: BatchEngine, work: Callable[[EngineThread], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        thread = EngineThread(engine, max_waiting=2)
        thread.start()
        try:
            return await asyncio.wait_for(work(thread), timeout=20)
        finally:
            await thread.stop()
            assert not thread.is_alive

    return asyncio.run(run())


async def events_of(generation: Generation) -> list[Event]:
    return [e async for part in generation.parts() for _, events in part for e in events]


def test_a_failing_step_costs_its_requests_and_no_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def work(thread: EngineThread) -> tuple[int, int]:
        lost = await thread.submit([REQUEST, REQUEST])
        with pytest.raises(ApiError) as caught:
            await events_of(lost)
        assert caught.value.status == 500
        later = await thread.submit([REQUEST] * 4)  # every place is free again
        return len(await events_of(later)), thread.n_waiting

    with caplog.at_level(logging.CRITICAL, "pyper.serve"):
        assert with_thread(Fragile(3), work) == (32, 0)


def test_places_are_given_back_whatever_ends_a_request() -> None:
    engine = Fragile()

    async def work(thread: EngineThread) -> None:
        with pytest.raises(PromptError):
            await thread.submit([REQUEST, Request((0, 999), REQUEST.sampling)])
        finished = await thread.submit([REQUEST])
        await events_of(finished)
        thread.cancel(finished)
        left = await thread.submit([REQUEST] * 3)
        thread.cancel(left)
        thread.cancel(left)
        with pytest.raises(ZeroDivisionError):
            await thread.call([lambda: 1 // 0])
        with pytest.raises(ApiError, match="4 places"):
            await thread.submit([REQUEST] * 5)
        await events_of(await thread.submit([REQUEST] * 4))
        assert thread.n_waiting == 0

    with_thread(engine, work)
    assert engine.idle


def test_a_request_cancelled_before_the_engine_saw_it_is_never_written() -> None:
    engine = Fragile()

    async def work(thread: EngineThread) -> None:
        engine.may_step.clear()
        running = await thread.submit([REQUEST])
        await asyncio.to_thread(engine.is_stepping.wait)
        waiting = asyncio.ensure_future(thread.submit([REQUEST] * 3))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.sleep(0)
        engine.may_step.set()
        await events_of(running)
        await events_of(await thread.submit([REQUEST] * 4))

    with_thread(engine, work)
    assert engine.stats().decoded_tokens < 8 * 6


def test_the_fifth_of_four_is_sent_away() -> None:
    engine = Fragile()

    async def work(thread: EngineThread) -> None:
        engine.may_step.clear()
        first = await thread.submit([REQUEST] * 3)
        call = asyncio.ensure_future(thread.call([lambda: 1, lambda: 2]))
        await asyncio.sleep(0)
        for refused in (thread.submit([REQUEST]), thread.call([lambda: 3])):
            with pytest.raises(ApiError) as caught:
                await refused
            assert caught.value.status == 429
        engine.may_step.set()
        assert await call == [1, 2]
        await events_of(first)

    with_thread(engine, work)


def test_a_slow_reader_gets_everything_in_fewer_parts() -> None:
    async def work(thread: EngineThread) -> None:
        generation = await thread.submit([REQUEST])
        await asyncio.sleep(0.5)
        parts = [part async for part in generation.parts()]
        assert len(parts) == 1
        assert len(parts[0][0][1]) == 8

    with_thread(Fragile(), work)
