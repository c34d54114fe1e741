"""Several parts of a run at the same time, each in a process of its own."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from rich.console import Console

from pyper.config import RunConfig
from pyper.errors import InterruptedRun, PyperError
from pyper.stages.assignment import ExpertData, read_assignment
from pyper.stages.bars import watch
from pyper.stages.context import Context, available_cores, open_context
from pyper.stages.train import Unit, train_unit
from pyper.train import TrainResult
from pyper.train.interrupt import catch_signals
from pyper.train.progress import Silent

_POLL_SECONDS = 0.3
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class _Outcome:
    """What a worker sends back: a result, or the parts of an error (which may not pickle)."""

    result: TrainResult | None
    message: str = ""
    hint: str = ""
    exit_code: int = 0


def train_in_parallel(
    context: Context, assigned: ExpertData, units: Sequence[Unit], jobs: int
) -> list[TrainResult]:
    """Train `units`, at most `jobs` at a time; cores are divided among them.

    Ctrl-C and SIGTERM stop all of them at their next step, with everything saved. Raises the first
    error, after the others have been asked to stop as well.
    """
    threads = max(1, available_cores() // jobs)
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_prepare_worker)
    with catch_signals() as stop, pool:
        with _signals_held_back():
            futures = [pool.submit(_work, context.run, str(u), threads) for u in units]
        try:
            watch(
                context,
                assigned,
                units,
                lambda: stop() or all(f.done() for f in futures) or any(map(_failed, futures)),
            )
        finally:
            _stop_all(pool, futures, stop.signal_number or signal.SIGTERM)
    done = [future for future in futures if not future.cancelled()]
    # Parts that were asked to stop because another one failed must not hide its error.
    done.sort(key=_was_interrupted)
    results = [_result_of(future) for future in done]
    if len(done) < len(futures):  # those that ran came to their end just when they should stop
        raise InterruptedRun(
            f"stopped with {len(futures) - len(done)} parts still to train",
            hint="run the same command again to go on",
            exit_code=stop.exit_code,
        )
    return results


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """For this process until the end; for those begun meanwhile until `_prepare_worker`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare_worker() -> None:
    """Signals are for whoever trains: an idle worker that died of one would block the others."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without it nobody waits for a worker, which would hold its folder's lock for hours."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(run: RunConfig, unit: str, threads: int) -> _Outcome:
    """In a worker process: train one part."""
    torch.set_num_threads(threads)
    try:
        context = open_context(run, Console(stderr=True, quiet=True))
        assigned = read_assignment(context.folder.assignment)
        kind, _, index = unit.partition(":")
        result = train_unit(
            context,
            assigned,
            Unit(kind, int(index or 0)),  # type: ignore[arg-type]
            Silent(),
        )
        return _Outcome(result)
    except InterruptedRun as error:
        return _Outcome(None, error.message, error.hint, error.exit_code)
    except PyperError as error:
        return _Outcome(None, f"{unit}: {error.message}", error.hint, error.exit_code)


def _failed(future: "Future[_Outcome]") -> bool:
    if not future.done() or future.cancelled():
        return False
    return future.exception() is not None or future.result().result is None


def _was_interrupted(future: "Future[_Outcome]") -> bool:
    return future.exception() is None and future.result().exit_code >= 128


def _result_of(future: "Future[_Outcome]") -> TrainResult:
    try:
        outcome = future.result()
    except BrokenProcessPool:
        raise PyperError(
            "a training process was killed from outside, most likely for lack of memory",
            hint="run the same command with `--jobs 1`: what was saved is used",
        ) from None
    if outcome.result is not None:
        return outcome.result
    if outcome.exit_code >= 128:
        raise InterruptedRun(outcome.message, hint=outcome.hint, exit_code=outcome.exit_code)
    raise PyperError(outcome.message, hint=outcome.hint)


def _stop_all(
    pool: ProcessPoolExecutor, futures: "Sequence[Future[_Outcome]]", number: int
) -> None:
    """Until all have ended, ask the workers to save and stop: some may only begin just now."""
    for future in futures:
        future.cancel()
    workers = dict(getattr(pool, "_processes", None) or {})
    while not all(future.done() for future in futures) or (
        # When one worker was killed, futures end at once and the other workers go on.
        any(_is_broken(future) for future in futures)
        and any(worker.is_alive() for worker in workers.values())
    ):
        for pid, worker in workers.items():
            with suppress(ProcessLookupError):
                if worker.is_alive():
                    os.kill(pid, number)
        time.sleep(_POLL_SECONDS)


def _is_broken(future: "Future[_Outcome]") -> bool:
    if not future.done() or future.cancelled():
        return False
    return isinstance(future.exception(), BrokenProcessPool)
