"""`train_step` as two recorded CUDA graphs: a small model's step is otherwise bound by launches."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pyper.data import Batch
from pyper.kernels.launch import ON_TRIAL
from pyper.nn import Transformer
from pyper.train.loss import LossFunction, next_token_loss
from pyper.train.optimizer import ExpertOptimizer
from pyper.train.step import (
    Measured,
    StepResult,
    checked,
    compute_gradients,
    train_step,
    update,
)

# Steps run as usual first: they allocate optimizer states, build kernels, choose algorithms.
_USUAL_STEPS = 3
# Launches of a step that takes longer (seconds) are hidden behind its kernels: recording it would
# only keep the memory of its activations.
_LONG_STEP = 0.1
# Experts that train together in one process, each in a thread.
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class _Recording:
    """Kernels that read the same memory and write the same memory at every replay."""

    inputs: tuple[Batch, ...]
    gradients: torch.cuda.CUDAGraph
    measured: Measured
    update: torch.cuda.CUDAGraph


class RecordedStep:
    """Does what `train_step` does, to the bit, for micro-batches of one shape.

    The first steps, batches of other shapes, and models whose kernels depend on their data run as
    usual. Between the graphs of gradients and update the numbers are looked at, so that a poisoned
    gradient still updates nothing.
    """

    def __init__(
        self, model: Transformer, optimizer: ExpertOptimizer, loss_fn: LossFunction
    ) -> None:
        self.model, self.optimizer, self.loss_fn = model, optimizer, loss_fn
        # A loss function of the user's may look at its data. On trial: bitwise equal on a GPU, but
        # before the optimizer was exchanged for one that no GPU has seen.
        self.can_record = ON_TRIAL and model.device.type == "cuda" and loss_fn is next_token_loss
        self._recording: _Recording | None = None
        self._usual_steps, self._seconds = 0, 0.0
        self._pool = torch.cuda.graph_pool_handle() if self.can_record else None

    def __call__(self, micro_batches: Sequence[Batch], rate_factor: float) -> StepResult:
        """One step, see `train_step`."""
        if not self._is_recordable(micro_batches):
            return self._usual_step(micro_batches, rate_factor)
        recording = self._recording
        if recording is None:
            with _ONE_AT_A_TIME:
                recording = self._recording = self._record(micro_batches)
        for static, batch in zip(recording.inputs, micro_batches, strict=True):
            static.tokens.copy_(batch.tokens, non_blocking=True)
            static.targets.copy_(batch.targets, non_blocking=True)
        recording.gradients.replay()
        result = checked(recording.measured, self.optimizer)
        self.optimizer.set_rates(rate_factor)
        recording.update.replay()
        return result

    def _usual_step(self, micro_batches: Sequence[Batch], rate_factor: float) -> StepResult:
        start = time.monotonic()
        result = train_step(self.model, micro_batches, self.optimizer, rate_factor, self.loss_fn)
        # It has waited for its gradients, and so for the update of the step before it.
        self._seconds = time.monotonic() - start
        self._usual_steps += 1
        return result

    def _is_recordable(self, micro_batches: Sequence[Batch]) -> bool:
        if not (self.can_record and self.model.has_fixed_shapes()):
            return False
        if self._usual_steps < _USUAL_STEPS or self._seconds > _LONG_STEP:
            return False
        if any(b.weights is not None for b in micro_batches):
            return False
        if self._recording is None:
            return True
        shapes = [b.tokens.shape for b in self._recording.inputs]
        return shapes == [b.tokens.shape for b in micro_batches]

    def _record(self, micro_batches: Sequence[Batch]) -> _Recording:
        inputs = tuple(
            Batch(b.tokens.to(self.model.device), b.targets.to(self.model.device))
            for b in micro_batches
        )
        torch.cuda.empty_cache()  # of usual steps: a recording has memory of its own
        gradients, updating = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # "thread_local": the loader's threads go on pinning memory meanwhile.
        with torch.cuda.graph(gradients, self._pool, capture_error_mode="thread_local"):
            measured = compute_gradients(self.model, inputs, self.optimizer, self.loss_fn)
        with torch.cuda.graph(updating, self._pool, capture_error_mode="thread_local"):
            update(self.model, self.optimizer)
        return _Recording(inputs, gradients, measured, updating)
