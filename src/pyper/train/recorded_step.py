"""`train_step` as two recorded CUDA graphs: a small model's step is otherwise bound by launches."""

import time
from collections.abc import Sequence

from pyper.data import Batch
from pyper.nn import Transformer
from pyper.train.loss import LossFunction, next_token_loss
from pyper.train.optimizer import ExpertOptimizer
from pyper.train.recording import Recording, record
from pyper.train.step import (
    Measured,
    StepResult,
    checked,
    compute_gradients,
    train_step,
    update,
)

# Steps run as usual first: see `record`.
USUAL_STEPS = 3
# Pauses between the kernels of a step that takes longer (seconds) are too short to matter, while
# recording it keeps the memory of its activations: 6 ms in the 274 of a 1.5 B expert.
LONG_STEP = 0.5


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
        # A loss function of the user's may look at its data.
        self.can_record = model.device.type == "cuda" and loss_fn is next_token_loss
        self._recording: Recording[Measured] | None = None
        self._rules: tuple[str, ...] = ()
        self._usual_steps, self._seconds = 0, 0.0

    def __call__(self, micro_batches: Sequence[Batch], rate_factor: float) -> StepResult:
        """One step, see `train_step`."""
        self._follow_rules()
        if not self._is_recordable(micro_batches):
            return self._usual_step(micro_batches, rate_factor)
        if self._recording is None:
            self._recording = self._record(micro_batches)
        result = checked(self._recording.replay_gradients(micro_batches), self.optimizer)
        self.optimizer.set_rates(rate_factor)
        self._recording.update.replay()
        return result

    def _follow_rules(self) -> None:
        """What was recorded goes by the rule of its time, and so did usual steps before it."""
        rules = self.model.training_rules()
        if rules != self._rules:
            self._rules, self._recording, self._usual_steps = rules, None, 0

    def _usual_step(self, micro_batches: Sequence[Batch], rate_factor: float) -> StepResult:
        start = time.monotonic()
        result = train_step(self.model, micro_batches, self.optimizer, rate_factor, self.loss_fn)
        # It has waited for its gradients, and so for the update of the step before it.
        self._seconds = time.monotonic() - start
        self._usual_steps += 1
        return result

    def _is_recordable(self, micro_batches: Sequence[Batch]) -> bool:
        largest = max(b.tokens.numel() for b in micro_batches)
        if not (self.can_record and self.model.has_fixed_shapes(largest)):
            return False
        if self._usual_steps < USUAL_STEPS or self._seconds > LONG_STEP:
            return False
        if any(b.weights is not None for b in micro_batches):
            return False
        return self._recording is None or self._recording.fits(micro_batches)

    def _record(self, micro_batches: Sequence[Batch]) -> Recording[Measured]:
        return record(
            micro_batches,
            self.model.device,
            lambda batches: compute_gradients(self.model, batches, self.optimizer, self.loss_fn),
            lambda: update(self.model, self.optimizer),
        )
