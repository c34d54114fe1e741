"""All experts at once on one GPU: small ones leave most of it idle."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from pyper.errors import InterruptedRun
from pyper.kernels.launch import ON_TRIAL
from pyper.nn import count_parameters
from pyper.stages.assign import ExpertData
from pyper.stages.bars import watch
from pyper.stages.context import Context
from pyper.stages.memory import training_memory
from pyper.stages.train import Unit, train_unit
from pyper.train import TrainResult
from pyper.train.interrupt import catch_signals
from pyper.train.progress import Silent

# A larger expert fills a GPU by itself.
_SMALL_PARAMETERS = 64_000_000
# Of the device's memory, for what all experts together are reckoned to need.
_MEMORY_SHARE = 0.6


def pays_together(context: Context, n_units: int) -> bool:
    """What `run.parallel_experts` says; for "auto": on a GPU, where experts are small and fit.

    On trial (`ON_TRIAL`): measured on a CPU only, where it changes nothing.
    """
    wanted = context.run.run.parallel_experts
    if wanted != "auto":
        return wanted
    if not ON_TRIAL or context.device.type != "cuda":
        return False
    if count_parameters(context.model) > _SMALL_PARAMETERS:
        return False
    total = torch.cuda.get_device_properties(context.device).total_memory
    return n_units * training_memory(context.run)["total"] <= _MEMORY_SHARE * total


def train_together(
    context: Context, assigned: ExpertData, units: Sequence[Unit]
) -> list[TrainResult]:
    """Train `units` in one process, each in a thread and on a stream of its own.

    Results are those of training one by one: nothing is shared but the device. A part that is done
    costs nothing more. Ctrl-C and SIGTERM stop all of them at their next step, with everything
    saved. Raises the first error, after the others have been asked to stop as well.
    """
    ended = threading.Event()
    with catch_signals() as stop, ThreadPoolExecutor(len(units)) as pool:
        futures = [
            pool.submit(
                _train_on_own_stream, context, assigned, unit, lambda _: stop() or ended.is_set()
            )
            for unit in units
        ]
        try:
            watch(
                context,
                assigned,
                units,
                lambda: stop() or all(f.done() for f in futures) or any(map(_failed, futures)),
            )
        finally:
            if stop() or any(map(_failed, futures)):
                ended.set()
    # Parts that were asked to stop because another one failed must not hide its error.
    failures = [error for future in futures if (error := future.exception()) is not None]
    failures.sort(key=lambda error: isinstance(error, InterruptedRun))
    if failures and isinstance(failures[0], InterruptedRun):
        raise InterruptedRun(failures[0].message, hint=failures[0].hint, exit_code=stop.exit_code)
    if failures:
        raise failures[0]
    return [future.result() for future in futures]


def _failed(future: "Future[TrainResult]") -> bool:
    return future.done() and future.exception() is not None


def _train_on_own_stream(
    context: Context, assigned: ExpertData, unit: Unit, should_stop: Callable[[int], bool]
) -> TrainResult:
    if context.device.type != "cuda":
        return train_unit(context, assigned, unit, Silent(), should_stop)
    with torch.cuda.device(context.device), torch.cuda.stream(torch.cuda.Stream(context.device)):
        return train_unit(context, assigned, unit, Silent(), should_stop)
