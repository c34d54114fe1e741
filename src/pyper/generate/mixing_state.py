"""Which experts one text needs while it grows, and with what weights.

The same rules that score text (`mixture/mixing.py`), a token at a time; with `prune = 0` both give
the same weights.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyper.mixture import Mixture, MixtureSettings, PrefixRouter
from pyper.mixture.mixing import inference_prices
from pyper.routing import keep_top_k, prune, route_prefix, scaled_prices


class MixingState:
    """The rule of one text. Experts are asked for no more than the rule needs."""

    def __init__(self, mixture: Mixture, capacity: int, pinned: int | None) -> None:
        self.settings: MixtureSettings = mixture.settings
        self.router: PrefixRouter | None = mixture.router
        self.n_experts = n_experts = mixture.n_experts
        self.pinned = 0 if n_experts == 1 else pinned
        self.live = [self.pinned in (None, expert) for expert in range(n_experts)]
        """Experts that may still be needed."""
        self.scores: NDArray[np.float32] = np.zeros((capacity, n_experts), dtype=np.float32)
        """(capacity, E), log p_e of each token given those before it, as far as it was read."""
        self.evidence = np.zeros(n_experts)
        """(E,), tempered sums of the scores that the posterior has taken in."""
        self._n_summed = 1  # the first token is given, not predicted
        self._window, self._decided = -1, -1

    @property
    def n_scored(self) -> int:
        """How many first tokens' scores the rule may ever look at."""
        settings = self.settings
        if self.pinned is not None:
            return 0
        if settings.mixing == "top1":
            return settings.prefix_tokens + 1
        if settings.mixing == "window" and self.router is not None:
            return settings.window + 1
        return len(self.scores)

    def n_evidence(self, n: int) -> int:
        """How many of n tokens all live experts must have read before the next is predicted."""
        settings = self.settings
        if self.pinned is not None:
            return 0
        if settings.mixing == "posterior":
            return n
        cold = settings.prefix_tokens if settings.mixing == "top1" else settings.window
        if n <= cold:
            return n
        if self.router is not None:
            return 0
        # The experts read for themselves: up to the last decision.
        return cold + 1 if settings.mixing == "top1" else (n - 1) // cold * cold + 1

    def decided(self, tokens: list[int]) -> int | None:
        """The one expert that predicts the next token; None: the posterior over the live ones."""
        settings, n_read = self.settings, len(tokens) - 1
        if self.pinned is not None:
            return self.pinned
        if settings.mixing == "posterior":
            return None
        length = settings.prefix_tokens if settings.mixing == "top1" else settings.window
        window = 0 if settings.mixing == "top1" else n_read // length - 1
        if n_read < length:
            return None
        if window != self._window:
            self._window, self._decided = window, self._route(tokens, window * length, length)
        return self._decided

    def is_settled(self, n: int) -> bool:
        """Whether no other expert will ever be needed, n tokens into the text."""
        return self.settings.mixing == "top1" and n > self.settings.prefix_tokens

    def stays_decided(self, n: int) -> bool:
        """Whether the same expert predicts after n + 1 tokens as after n, whatever comes."""
        settings = self.settings
        if self.pinned is not None or settings.mixing == "posterior":
            return self.pinned is not None
        if settings.mixing == "top1":
            return self.is_settled(n)
        return n - 1 >= settings.window and (n - 1) // settings.window == n // settings.window

    def take_in(self, n: int) -> None:
        """Let the posterior see the scores of the first n tokens."""
        if n > self._n_summed:
            new = self.settings.temperature * self.scores[self._n_summed : n].astype(np.float64)
            # One after another: a sum would add in an order that depends on how many there are.
            if len(new) > 1:
                new = np.cumsum(np.vstack([self.evidence, new]), axis=0)
                self.evidence = new[-1]
            else:
                self.evidence = self.evidence + new[0]
            self._n_summed = n

    def _route(self, tokens: list[int], start: int, length: int) -> int:
        """By the `length` tokens after the one at `start`."""
        scores = torch.from_numpy(self.scores[start + 1 : start + length + 1])[None]
        if self.router is not None:
            read = torch.tensor(tokens[: start + length + 1])[None]
            scores = self.router.token_scores(read)[:, start:]
        prices = inference_prices(self.settings)
        if prices is not None:
            prices = scaled_prices(prices, length, reference_length=1)
        return int(route_prefix(scores, length, prices=prices))


def posterior_of(states: list[MixingState]) -> Tensor:
    """Weights (R, E) of texts whose evidence has been taken in; unlikely experts stop for good.

    Under `top1` and `window` this is the cold start: all experts, none dropped.
    """
    log_weights, live = posterior_log_weights(states[0].settings, *evidence_of(states))
    for state, row in zip(states, live.tolist(), strict=True):
        state.live = row
    return log_weights.exp().float()


def evidence_of(states: list[MixingState]) -> tuple[Tensor, Tensor]:
    """What the posterior has taken in, and who is live, (R, E) both."""
    evidence = torch.from_numpy(np.stack([state.evidence for state in states]))
    return evidence, torch.tensor([state.live for state in states])


def posterior_log_weights(
    settings: MixtureSettings, evidence: Tensor, live: Tensor
) -> tuple[Tensor, Tensor]:
    """Log weights (R, E), and who is live from now on; evidence float64 and live (R, E)."""
    log_weights = evidence.masked_fill(~live, -math.inf).log_softmax(dim=-1)
    if settings.mixing != "posterior":
        return log_weights, live
    if settings.prune > 0:
        # Many experts begin with little each: half of an equal share is no evidence against one.
        threshold = min(settings.prune, 0.5 / log_weights.shape[-1])
        log_weights = prune(log_weights, threshold)
        live = torch.isfinite(log_weights)
    is_all = settings.top_k >= log_weights.shape[-1]
    return log_weights if is_all else keep_top_k(log_weights, settings.top_k), live
