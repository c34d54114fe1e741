"""All experts at once on one device: small ones leave most of a GPU idle."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import torch

from pyper.config import RunConfig
from pyper.errors import InterruptedRun
from pyper.nn import count_parameters
from pyper.stages.assignment import ExpertData
from pyper.stages.bars import watch
from pyper.stages.context import Context
from pyper.stages.memory import training_memory
from pyper.stages.train import Unit, train_unit
from pyper.train import TrainResult
from pyper.train.interrupt import StopRequest, catch_signals
from pyper.train.progress import Silent
from pyper.train.stacked_steps import StackedSteps
from pyper.train.step import NewStep

# A larger expert fills a GPU by itself. In parameters times tokens of a micro-batch: on an H200
# eight experts at 5e10 (3 M, 16 k tokens) gain 1.37, and 1.51 is all that larger batches would.
_SMALL_WORK = 2e11
# Their weights are copied side by side in every pass, however few tokens it reads.
_SMALL_PARAMETERS = 64_000_000
# Of the device's memory, for what all experts together are reckoned to need.
_MEMORY_SHARE = 0.6


def pays_together(context: Context, n_units: int) -> bool:
    """What `run.parallel_experts` says; for "auto": on a GPU, where experts are small and fit.

    Only dense experts in 16 or 32 bits go side by side.
    """
    run = context.run
    if run.model.kind != "dense" or run.train.precision == "fp8":
        return False
    if run.run.parallel_experts != "auto":
        return run.run.parallel_experts
    if context.device.type != "cuda" or not is_small(run):
        return False
    total = torch.cuda.get_device_properties(context.device).total_memory
    return n_units * training_memory(run, on_kernels=True)["total"] <= _MEMORY_SHARE * total


def is_small(run: RunConfig) -> bool:
    """Whether one expert's step leaves much of a GPU idle."""
    tokens, size = run.train.global_batch_tokens, run.train.micro_batch_size
    if size != "auto":
        tokens = min(tokens, size * run.data.seq_len)
    parameters = count_parameters(run.model)
    return parameters <= _SMALL_PARAMETERS and parameters * tokens <= _SMALL_WORK


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
