"""From log-probabilities to the next token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyper.errors import PromptError


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn and when to stop. `temperature` 0 takes the likeliest token."""

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int | None = None
    """Draw among the k likeliest tokens."""
    top_p: float = 1.0
    """… among the fewest whose probabilities reach p (nucleus, arXiv:1904.09751)."""
    min_p: float = 0.0
    """… among those at least this share as likely as the likeliest (arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Log-probabilities of tokens already there are multiplied by this (arXiv:1909.05858)."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are left out of it."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises PromptError for a value out of range."""
        checks = [
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "more than 0"),
            ("stop", all(self.stop), "without empty strings"),
        ]
        for name, is_fine, should in checks:
            if not is_fine:
                raise PromptError(
                    f"`{name}` must be {should}, not {getattr(self, name)!r}",
                    hint=f"change `--{name.replace('_', '-')}`",
                )


def next_token(
    log_probs: Tensor, seen: Tensor, config: SamplingConfig, generator: torch.Generator
) -> int:
    """Draw one token from log_probs (V,); `seen` (T,) are the row's tokens so far.

    The generator lives on the CPU, so that a seed gives the same text on every device.
    """
    scores = log_probs.float()
    if config.repetition_penalty != 1.0:
        again = seen.unique()
        scores = scores.index_copy(0, again, scores[again] * config.repetition_penalty)
    if config.temperature == 0:
        return int(scores.argmax())
    # The likeliest at 0, and a floor that is greedy all the same: nothing overflows.
    scaled = (scores - scores.max()) / max(config.temperature, 1e-6)
    probs = filtered_probs(scaled, config).cpu()
    return int(torch.multinomial(probs, 1, generator=generator))


def filtered_probs(scores: Tensor, config: SamplingConfig) -> Tensor:
    """Probabilities (V,) after top-k, top-p and min-p; at least one token is left."""
    probs = scores.softmax(dim=-1)
    if config.top_k is not None and config.top_k < len(probs):
        threshold = probs.topk(config.top_k).values[-1]
        probs = probs.where(probs >= threshold, 0.0)
    if config.top_p < 1:
        probs = probs / probs.sum()
        ordered, index = probs.sort(descending=True, stable=True)
        # A token stays when those before it have not reached p: the first one always does.
        kept = ordered.cumsum(0) - ordered < config.top_p
        probs = torch.zeros_like(probs).scatter(0, index, ordered * kept)
    if config.min_p > 0:
        probs = probs.where(probs >= config.min_p * probs.max(), 0.0)
    return probs / probs.sum()
