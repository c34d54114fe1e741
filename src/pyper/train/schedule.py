"""Learning-rate schedules: pure functions of the step, so that resuming needs no state."""

import math
from dataclasses import dataclass

from pyper.config import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """Factor on the peak learning rate: warm-up, then the shape, ending at `floor`."""

    shape: str
    total_steps: int
    warmup_steps: int
    decay_fraction: float
    floor: float

    def factor(self, step: int) -> float:
        """The factor for the update number `step` (0-based)."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = self._progress(step)
        if self.shape == "cosine":
            height = 0.5 * (1 + math.cos(math.pi * progress))
        elif self.shape == "linear":
            height = 1 - progress
        elif self.shape == "wsd":
            height = min(1.0, (1 - progress) / self.decay_fraction)
        else:
            height = 1.0
        return self.floor + (1 - self.floor) * height

    def _progress(self, step: int) -> float:
        """0 after the warm-up; 1 would be reached by the update after the last one."""
        return min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))


def warmup_steps_of(config: TrainConfig, total_steps: int) -> int:
    """`warmup_steps`, or else the fraction of all steps."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return round(config.warmup_fraction * total_steps)


def seed_schedule(config: TrainConfig, total_steps: int) -> Schedule:
    """Warm up, then hold: the seed is branched from, never finished."""
    return Schedule("constant", total_steps, warmup_steps_of(config, total_steps), 1.0, 0.0)


def branch_schedule(config: TrainConfig, total_steps: int, *, warm: bool) -> Schedule:
    """The configured shape; a `warm` start (from the seed's optimizer states) needs no warm-up."""
    floor = 0.0
    if config.learning_rate != "auto":
        floor = min(1.0, config.min_learning_rate / config.learning_rate)
    warmup = 0 if warm else warmup_steps_of(config, total_steps)
    return Schedule(config.schedule, total_steps, warmup, config.decay_fraction, floor)
