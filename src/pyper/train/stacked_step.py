"""One optimizer step of several experts at once, in batched products."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from pyper.data import Batch
from pyper.errors import PyperError
from pyper.nn import Transformer
from pyper.nn.stacked_transformer import StackedTransformer
from pyper.train.loss import loss_of_states
from pyper.train.optimizer import ExpertOptimizer, update_together
from pyper.train.recorded_step import LONG_STEP, USUAL_STEPS
from pyper.train.recording import Recording, record
from pyper.train.step import StepResult, judged


class StackedStep:
    """Does for each of E experts what `train_step` does, equal but for rounding.

    Experts have optimizers, rates and clipping of their own: none depends on the others. On a GPU
    the step is recorded, as `RecordedStep` does it.
    """

    def __init__(
        self, models: Sequence[Transformer], optimizers: Sequence[ExpertOptimizer]
    ) -> None:
        """The models are of one `stacking_kind`."""
        self.models, self.optimizers = list(models), list(optimizers)
        self._stack = StackedTransformer(models)
        self._device = models[0].device
        self._can_record = self._device.type == "cuda"
        self._recording: Recording[Tensor] | None = None
        self._usual_steps, self._seconds = 0, 0.0

    def __call__(
        self, micro_batches: Sequence[Sequence[Batch]], rate_factors: Sequence[float]
    ) -> list[StepResult | PyperError]:
        """Of each expert its result, or why it was not updated.

        micro_batches: of each expert as many, of the same shapes. rate_factors: of each expert.
        """
        batches = [batch for own in micro_batches for batch in own]
        if self._is_recordable(batches):
            return self._recorded_step(batches, rate_factors)
        self.forget()
        start = time.monotonic()
        sums = self._compute(batches).tolist()  # the one wait for the device in a step
        self._seconds = time.monotonic() - start
        self._usual_steps += 1
        results = self._judge(sums, rate_factors)
        update_together(self._sound(results))
        self.forget()
        return results

    def forget(self) -> None:
        """Drop gradients, and a recording where there is one."""
        self._recording = None
        for optimizer in self.optimizers:
            optimizer.clear_gradients()

    def _recorded_step(
        self, batches: Sequence[Batch], rate_factors: Sequence[float]
    ) -> list[StepResult | PyperError]:
        if self._recording is None:
            # The update leaves the gradients where they are, for the case below.
            self._recording = record(
                batches, self._device, self._compute, lambda: update_together(self.optimizers)
            )
        sums = self._recording.replay_gradients(batches).tolist()
        results = self._judge(sums, rate_factors)
        sound = self._sound(results)
        if len(sound) == len(results):
            self._recording.update.replay()
        else:  # the graph would update all
            update_together(sound)
            self.forget()
        return results

    def _compute(self, batches: Sequence[Batch]) -> Tensor:
        """Clipped gradients of the mean losses, and what `Measured.sums` has, (E, 3).

        batches: all of the first expert, then those of the next. Never waits for the device.
        """
        E = len(self.models)
        total = torch.zeros(E, device=self._device)
        weight = torch.zeros(E, device=self._device)
        n_parts = len(batches) // E
        for part in range(n_parts):  # one of each expert
            losses, weights = self._losses([b.to(self._device) for b in batches[part::n_parts]])
            losses.sum().backward()
            for optimizer in self.optimizers:
                optimizer.collect_gradients()
            total += losses.detach()
            weight += weights
        scales = (1.0 / weight).unbind()
        norms = [o.clip_gradients(s) for o, s in zip(self.optimizers, scales, strict=True)]
        return torch.stack((total, weight, torch.stack(norms).float()), dim=1)

    def _losses(self, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """Summed losses and weights (E,)."""
        states = self._stack.read(torch.stack([b.tokens for b in batches])).unbind()
        triples = zip(self.models, states, batches, strict=True)
        losses = [loss_of_states(*triple) for triple in triples]
        totals = torch.stack([loss.total for loss in losses])
        return totals, torch.stack([loss.weight for loss in losses])

    def _judge(
        self, sums: Sequence[Sequence[float]], rate_factors: Sequence[float]
    ) -> list[StepResult | PyperError]:
        """The numbers of each, with its rate set; or what is wrong with them."""
        results: list[StepResult | PyperError] = []
        for own, optimizer, factor in zip(sums, self.optimizers, rate_factors, strict=True):
            try:
                results.append(judged(own, (), optimizer))
            except PyperError as error:
                results.append(error)
            optimizer.set_rates(factor)
        return results

    def _sound(self, results: Sequence[StepResult | PyperError]) -> list[ExpertOptimizer]:
        pairs = zip(self.optimizers, results, strict=True)
        return [optimizer for optimizer, result in pairs if isinstance(result, StepResult)]

    def _is_recordable(self, batches: Sequence[Batch]) -> bool:
        if not self._can_record or any(b.weights is not None for b in batches):
            return False
        if self._recording is not None:
            return self._recording.fits(batches)
        return self._usual_steps >= USUAL_STEPS and self._seconds <= LONG_STEP
