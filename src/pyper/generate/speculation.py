"""Guessing tokens, so that an expert reads several in one pass.

The experts read the guesses along with the last token. The next tokens are drawn as ever, from the
same predictions with the same chance; as long as a guess is what was drawn, what comes after it has
been read already. So the text is the same, token for token, whoever guesses (for guesses without
probabilities this is the acceptance rule of arXiv:2211.17192: x is kept with probability p(x)).
"""

import time
from collections.abc import Callable, Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

import torch

from pyper.generate.reading import Text
from pyper.nn import KVCache, Transformer


class Drafter(Protocol):
    """Guesses what comes next."""

    def guess(self, text: Text, n: int) -> list[int]:
        """At most n tokens that may follow those of the text."""


class RepetitionDrafter:
    """What followed the last tokens where they stood before (prompt lookup): costs nothing."""

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        """Endings of `longest` tokens are looked for first, then shorter ones."""
        self.lengths = range(longest, shortest - 1, -1)

    def guess(self, text: Text, n: int) -> list[int]:
        """The tokens after the latest earlier occurrence of the text's end."""
        tokens = text.tokens
        for length in self.lengths:
            end = tokens[-length:]
            for start in range(len(tokens) - length - 1, -1, -1):
                if tokens[start : start + length] == end:
                    return tokens[start + length : start + length + n]
        return []


class ModelDrafter:
    """The likeliest tokens of a small expert that shares the vocabulary."""

    def __init__(self, model: Transformer, n_tokens: int | None = None) -> None:
        """n_tokens: only the first so many are guessed: other models may not have the rows that
        pad this one's table. Default: all."""
        self.model, self.n_tokens = model, n_tokens
        self._read: WeakKeyDictionary[Text, tuple[KVCache, list[int]]] = WeakKeyDictionary()

    @torch.no_grad()
    def guess(self, text: Text, n: int) -> list[int]:
        """Written greedily after the text; guesses that came true are not read again.

        Nothing where the model's own context ends.
        """
        n = min(n, self._context(text) + 1 - len(text.tokens))
        if n < 1:
            return []
        cache, read = self._read.setdefault(text, (self._cache(text), []))
        kept = _common_beginning(read, text.tokens[:-1])
        cache.lengths.fill_(kept)
        new, guesses = text.tokens[kept:], list[int]()
        for _ in range(n):
            states = self.model.extend(torch.tensor([new]).to(self.model.device), cache)
            logits = self.model.head(states[:, -1])[..., : self.n_tokens]
            new = [int(logits.argmax())]
            guesses += new
        read[:] = text.tokens + guesses[:-1]
        return guesses

    def _cache(self, text: Text) -> KVCache:
        model = self.model
        return KVCache.allocate(
            model.config, 1, self._context(text), device=model.device, dtype=model.dtype
        )

    def _context(self, text: Text) -> int:
        """The most tokens of the text that can be read."""
        return min(text.capacity, self.model.config.seq_len or text.capacity)


class RouterDrafter:
    """One tiny model per expert, as of an `LMRouter`: that of the expert which leads guesses."""

    def __init__(self, models: Sequence[Transformer], n_tokens: int | None = None) -> None:
        """n_tokens: see `ModelDrafter`."""
        self.drafters = [ModelDrafter(model, n_tokens) for model in models]

    def guess(self, text: Text, n: int) -> list[int]:
        """What the model of the text's likeliest expert would write."""
        weights = text.weights or (0.0,) * len(self.drafters)
        return self.drafters[max(text.live, key=lambda expert: weights[expert])].guess(text, n)


def _common_beginning(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


class Payoff:
    """Whether guessing pays: seconds per token with and without it, measured in turns.

    Only time depends on it, never the text.
    """

    # Steps of a trial, and between trials of the way that is not taken.
    TRIAL, PERIOD = 16, 512

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.is_on = True
        self._seconds, self._tokens = {True: 0.0, False: 0.0}, {True: 0, False: 0}
        self._left, self._in_trial = self.TRIAL, True
        self._since: float | None = None

    def begin(self) -> None:
        """Before a step."""
        self._since = self.clock()

    def end(self, n_tokens: int, *, counts: bool) -> None:
        """After a step. counts: whether it did nothing but write `n_tokens`."""
        if not counts or self._since is None or n_tokens == 0:
            return
        self._seconds[self.is_on] += self.clock() - self._since
        self._tokens[self.is_on] += n_tokens
        self._left -= 1
        if self._left == 0:
            self._turn()

    def _turn(self) -> None:
        """After a trial of both ways the faster one; after a period, the other one on trial."""
        other = not self.is_on
        if self._in_trial and self._tokens[other]:
            way = self._cost(True) < self._cost(False)
            self._in_trial, self._left = False, self.PERIOD
        else:
            way, self._in_trial, self._left = other, True, self.TRIAL
        self.is_on = way
        self._seconds[way], self._tokens[way] = 0.0, 0  # what was long ago does not count

    def _cost(self, way: bool) -> float:
        return self._seconds[way] / self._tokens[way]
