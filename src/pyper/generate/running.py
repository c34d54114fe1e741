"""A request that has been admitted: its text so far, and what each token adds."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch

from pyper.generate.reading import Text
from pyper.generate.request import Event, FinishReason, Request
from pyper.generate.text import TextStream

Alternatives = tuple[tuple[int, float], ...]
# Numbers drawn at a time: alone, each would cost as much. They are the same however many.
_CHANCES = 64


def chances(seed: int) -> Iterator[float]:
    """Numbers in [0, 1), one for each token; on the CPU: a seed gives one text on every device."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.rand(_CHANCES, generator=generator).tolist()


@dataclass(eq=False)
class Running:
    """One row of the batch."""

    request_id: int
    request: Request
    text: Text
    shown: TextStream
    chance: Iterator[float]
    """One number for each token that is drawn."""

    @property
    def is_last(self) -> bool:
        """Whether the next token is the last, whatever it is."""
        return len(self.text.tokens) + 1 >= self.text.capacity

    def add(
        self, token: int, log_prob: float, others: Alternatives, stop_ids: Collection[int]
    ) -> Event:
        """What one more token shows, and whether it ends the text: a new document or another
        stop token, a stop string, the limit."""
        finished: FinishReason | None = None
        shown = ""
        if token in stop_ids:
            finished = "stop"
        else:
            shown = self.shown.push(token)
            if self.shown.stopped:
                finished = "stop"
            elif self.is_last:
                finished = "length"
        if finished is not None:
            shown += self.shown.finish()
        weights = self.text.known_weights
        expert = weights.index(max(weights))
        return Event(self.request_id, token, shown, log_prob, others, expert, weights, finished)
