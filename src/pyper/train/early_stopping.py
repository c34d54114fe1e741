"""Stop when validation no longer improves."""

import math
from dataclasses import dataclass

from pyper.config import EarlyStoppingConfig


@dataclass
class EarlyStopping:
    """Remembers the best validation loss and how many validations ago it was."""

    patience: int | None
    """None never stops, but still tells which checkpoint is the best."""
    min_delta: float = 0.0
    best_loss: float = math.inf
    best_step: int = -1
    waited: int = 0
    last_loss: float = math.nan

    @classmethod
    def from_config(cls, config: EarlyStoppingConfig | None) -> "EarlyStopping":
        """The settings of a run file; None keeps going to the end."""
        if config is None:
            return cls(patience=None)
        return cls(config.patience, config.min_delta)

    def update(self, step: int, loss: float) -> bool:
        """Take in one validation loss in nats per token; True when it is the best so far."""
        self.last_loss = loss
        if loss < self.best_loss - self.min_delta:
            self.best_loss, self.best_step, self.waited = loss, step, 0
            return True
        self.waited += 1
        return False

    @property
    def should_stop(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self.waited >= self.patience

    def state_dict(self) -> dict[str, float | int]:
        """What resuming needs."""
        return {
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "waited": self.waited,
            "last_loss": self.last_loss,
        }

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Go on from a saved state."""
        self.best_loss = float(state["best_loss"])
        self.last_loss = float(state["last_loss"])
        self.best_step, self.waited = int(state["best_step"]), int(state["waited"])
