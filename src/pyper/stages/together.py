"""All experts at once on one device: small ones leave most of a GPU idle."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

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
from pyper.train.interrupt import StopRequest, catch_signals
from pyper.train.progress import Silent
from pyper.train.stacked_steps import StackedSteps
from pyper.train.step import NewStep

# A larger expert fills a GPU by itself.
_SMALL_PARAMETERS = 64_000_000
# Of the device's memory, for what all experts together are reckoned to need.
_MEMORY_SHARE = 0.6


def pays_together(context: Context, n_units: int) -> bool:
    """What `run.parallel_experts` says; for "auto": on a GPU, where experts are small and fit.

    Only dense experts in 16 or 32 bits go side by side. On trial (`ON_TRIAL`): with Muon,
    not all of its tests on a GPU pass yet.
    """
    wanted = context.run.run.parallel_experts
    if context.model.kind != "dense" or context.run.train.precision == "fp8":
        return False
    if wanted != "auto":
        return wanted
    if not ON_TRIAL or context.device.type != "cuda":
        return False
    if count_parameters(context.model) > _SMALL_PARAMETERS:
        return False
    total = torch.cuda.get_device_properties(context.device).total_memory
    return n_units * training_memory(context.run, on_kernels=True)["total"] <= _MEMORY_SHARE * total


def train_together(
    context: Context, assigned: ExpertData, units: Sequence[Unit]
) -> list[TrainResult]:
    """Train `units` in one process: loops in threads of their own, steps in batched products.

    Results are those of training one by one but for rounding. A part that is done costs nothing
    more. Ctrl-C and SIGTERM stop all of them at their next step, with everything saved. Raises the
    first error, after the others have been asked to stop as well.
    """
    steps, ended = StackedSteps(len(units)), threading.Event()
    with (
        catch_signals() as stop,
        ThreadPoolExecutor(len(units) + 1) as pool,
        _current(context.device),
    ):
        try:
            futures = [
                pool.submit(_train, context, assigned, unit, steps.loop(number), stop, ended)
                for number, unit in enumerate(units)
            ]
            pool.submit(watch, context, assigned, units, lambda: all(f.done() for f in futures))
            steps.run()
        finally:
            ended.set()
            steps.close()
    return _results_of(futures, stop)


def _train(
    context: Context,
    assigned: ExpertData,
    unit: Unit,
    loop: AbstractContextManager[NewStep],
    stop: StopRequest,
    ended: threading.Event,
) -> TrainResult:
    """In a thread of its own; an error asks the others to stop."""
    try:
        with loop as new_step, _current(context.device):
            return train_unit(
                context, assigned, unit, Silent(), lambda _: stop() or ended.is_set(), new_step
            )
    except BaseException:
        ended.set()
        raise


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Kernels run on the current device, which each thread has of its own."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _results_of(futures: "Sequence[Future[TrainResult]]", stop: StopRequest) -> list[TrainResult]:
    """Parts that were asked to stop because another one failed must not hide its error."""
    failures = [error for future in futures if (error := future.exception()) is not None]
    failures.sort(key=lambda error: isinstance(error, InterruptedRun))
    if failures and isinstance(failures[0], InterruptedRun):
        raise InterruptedRun(failures[0].message, hint=failures[0].hint, exit_code=stop.exit_code)
    if failures:
        raise failures[0]
    return [future.result() for future in futures]
