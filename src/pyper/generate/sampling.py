"""From log-probabilities to the next token."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyper.errors import PromptError
from pyper.generate.transfer import to_device
from pyper.kernels import drawing
from pyper.kernels.drawing import DrawRules


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
            ("seed", -(2**63) <= self.seed < 2**64, "in [-2^63, 2^64)"),
        ]
        for name, is_fine, should in checks:
            if not is_fine:
                raise PromptError(
                    f"`{name}` must be {should}, not {getattr(self, name)!r}",
                    hint=f"change `--{name.replace('_', '-')}`",
                )


@dataclass(frozen=True)
class SamplingBatch:
    """The settings of the rows (R) of one draw, as columns (R, 1) on their device."""

    divisor: Tensor
    """The temperature; where it is 0, a small number."""
    greedy_rows: Tensor | None
    """True where the likeliest token is taken. None: nowhere."""
    top_k: Tensor | None
    """None here and below: no row uses it, and its work is saved."""
    top_p: Tensor | None
    min_p: Tensor | None
    repetition_penalty: Tensor | None
    is_greedy: bool
    """All rows take the likeliest token."""
    rules: DrawRules
    """The same but for the penalty, as a kernel reads it."""

    @classmethod
    def of(cls, configs: Sequence[SamplingConfig], device: torch.device) -> "SamplingBatch":
        """One row for each configuration."""

        def column(values: Sequence[float]) -> Tensor:
            return to_device(torch.tensor(values), device).unsqueeze(-1)

        def optional(values: list[float], unused: float) -> Tensor | None:
            return None if all(v == unused for v in values) else column(values)

        greedy = [c.temperature == 0 for c in configs]
        return cls(
            # A floor that is greedy all the same: nothing overflows.
            column([max(c.temperature, 1e-6) for c in configs]),
            column(greedy) if any(greedy) else None,
            optional([c.top_k or math.inf for c in configs], math.inf),
            optional([c.top_p for c in configs], 1.0),
            optional([c.min_p for c in configs], 0.0),
            optional([c.repetition_penalty for c in configs], 1.0),
            all(greedy),
            _rules(configs, device),
        )


def _rules(configs: Sequence[SamplingConfig], device: torch.device) -> DrawRules:
    table = [
        [max(c.temperature, 1e-6) if c.temperature else 0.0, c.top_k or math.inf, c.top_p, c.min_p]
        for c in configs
    ]
    has_top = any(c.top_k is not None or c.top_p < 1 for c in configs)
    return DrawRules(to_device(torch.tensor(table), device), has_top)


def draw(
    log_probs: Tensor, batch: SamplingBatch, uniforms: Tensor, seen: Tensor | None = None
) -> Tensor:
    """One token (R,) for each row of log_probs (R, V), where the rows are.

    uniforms: (R,) in [0, 1), all the chance there is: one number gives one token on any device.
    seen: (R, V), True for tokens that the row has already (for the repetition penalty).
    """
    scores = log_probs.float()
    if batch.repetition_penalty is not None:
        assert seen is not None
        scores = torch.where(seen, scores * batch.repetition_penalty, scores)
    if batch.is_greedy:
        return scores.argmax(dim=-1)
    if drawing.takes(scores):
        return drawing.draw_rows(scores, batch.rules, uniforms)
    return draw_torch(scores, batch, uniforms)


def draw_torch(scores: Tensor, batch: SamplingBatch, uniforms: Tensor) -> Tensor:
    """`draw` of float32 scores without a penalty, in plain torch."""
    best = scores.max(dim=-1, keepdim=True)
    # The likeliest at 0: nothing overflows.
    scaled = (scores - best.values) / batch.divisor
    reached = filtered_probs(scaled, batch).cumsum(dim=-1)
    drawn = torch.searchsorted(reached, uniforms[:, None] * reached[:, -1:], right=True)
    # Rounding may leave nothing above a number just below 1.
    takes_best = drawn == scores.shape[-1]
    if batch.greedy_rows is not None:
        takes_best = takes_best | batch.greedy_rows
    return torch.where(takes_best, best.indices, drawn).squeeze(-1)


def filtered_probs(scores: Tensor, batch: SamplingBatch) -> Tensor:
    """Probabilities (R, V) after top-k, top-p and min-p; at least one token of a row is left."""
    probs = scores.softmax(dim=-1)
    if batch.top_k is None and batch.top_p is None and batch.min_p is None:
        return probs
    if batch.top_k is not None or batch.top_p is not None:
        ordered, index = probs.sort(dim=-1, descending=True, stable=True)
        if batch.top_k is not None:
            last = (batch.top_k.clamp(max=probs.shape[-1]) - 1).long()
            ordered = ordered.where(ordered >= ordered.gather(-1, last), 0.0)
        if batch.top_p is not None:
            ordered = ordered / ordered.sum(dim=-1, keepdim=True)
            # A token stays when those before it have not reached p: the first one always does.
            before = ordered.cumsum(dim=-1) - ordered
            ordered = ordered.where((before < batch.top_p) | (batch.top_p == 1), 0.0)
        probs = torch.zeros_like(probs).scatter(-1, index, ordered)
    if batch.min_p is not None:
        probs = probs.where(probs >= batch.min_p * probs.amax(dim=-1, keepdim=True), 0.0)
    return probs / probs.sum(dim=-1, keepdim=True)
