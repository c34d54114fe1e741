"""Tokens are drawn where the predictions are; the host hears of them in small copies."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyper.generate.predictions import Predictions
from pyper.generate.running import Alternatives, Running
from pyper.generate.sampling import SamplingBatch, draw
from pyper.generate.transfer import OnItsWay, to_device, to_host


class Drawn(NamedTuple):
    """One token of one row, and what was said of it."""

    token: int
    log_prob: float
    scores: list[float]
    """(A,), the experts' log-probabilities."""
    alternatives: Alternatives
    """The likeliest tokens, as many as the row asked for."""


@dataclass(frozen=True)
class Ends:
    """Where some rows (R) stand with the tokens that are being drawn, all of it where they are."""

    rows: list[Running]
    experts: list[list[int]]
    """(R, A), those that had read the row."""
    tokens: Tensor
    """(R,)."""
    scores: Tensor
    """(R, A), the experts' log-probabilities of the tokens."""
    settings: SamplingBatch
    """Of the rows."""
    seen: Tensor | None
    """(R, V), True for tokens that a row has by now; None where no row asks."""

    def of(self, index: list[int]) -> "Ends":
        """Of these rows only."""
        if len(index) == len(self.rows):
            return self
        at = to_device(torch.tensor(index), self.tokens.device)
        rows = [self.rows[i] for i in index]
        return Ends(
            rows,
            [self.experts[i] for i in index],
            self.tokens[at],
            self.scores[at],
            _settings(rows, at.device),
            None if self.seen is None else self.seen[at],
        )


@dataclass(frozen=True)
class Draw:
    """One token for each of some rows (R), perhaps still on its way to the host."""

    ends: Ends
    _coming: OnItsWay
    """Tokens (R,), their log-probabilities (R,); then scores, then the likeliest, if not those."""
    _n_best: int

    def outcomes(self) -> list[Drawn]:
        """By row; waits for them."""
        tokens, log_probs, *more = (part.tolist() for part in self._coming.wait())
        scores = more.pop(0) if self.ends.scores.shape[1] > 1 else [[said] for said in log_probs]
        others: list[Alternatives] = [()] * len(tokens)
        if self._n_best:
            wanted = [row.request.n_logprobs for row in self.ends.rows]
            pairs = zip(wanted, *more, strict=True)
            others = [tuple(zip(best[:n], values[:n], strict=True)) for n, best, values in pairs]
        return [Drawn(*row) for row in zip(tokens, log_probs, scores, others, strict=True)]


def draw_tokens(
    rows: list[Running], predictions: Predictions, n_tokens: int, last: Ends | None = None
) -> Draw:
    """Draw a token for each row, without waiting for a GPU.

    n_tokens: of the tokenizer; a model's tables may be longer, and no text has those entries.
    last: of the same rows, a token ago, if the host has not seen that yet.
    """
    log_probs = predictions.log_probs[:, :n_tokens]
    settings = _settings(rows, log_probs.device) if last is None else last.settings
    seen = None
    if settings.repetition_penalty is not None:
        seen = _seen(rows, log_probs) if last is None or last.seen is None else last.seen
    tokens, of_mixture = _draw(rows, log_probs, settings, seen)
    if seen is not None:
        seen.scatter_(1, tokens[:, None], value=True)
    per_expert, of_experts = predictions.per_expert, of_mixture[:, None]
    coming = [tokens, of_mixture]
    if per_expert.shape[1] > 1:
        index = tokens[:, None, None].expand(-1, per_expert.shape[1], 1)
        of_experts = per_expert.gather(-1, index).squeeze(-1)
        coming.append(of_experts)
    n_best = max(row.request.n_logprobs for row in rows)
    if n_best:
        best = log_probs.topk(n_best, dim=-1)
        coming += [best.indices, best.values]
    ends = Ends(rows, predictions.experts, tokens, of_experts, settings, seen)
    return Draw(ends, to_host(*coming), n_best)


def _draw(
    rows: Sequence[Running], log_probs: Tensor, settings: SamplingBatch, seen: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Tokens (R,) and their log-probabilities (R,), of log_probs (R, V)."""
    if settings.is_greedy and seen is None:
        best = log_probs.max(dim=-1)
        return best.indices, best.values
    chance = torch.tensor([next(row.chance) for row in rows])
    tokens = draw(log_probs, settings, to_device(chance, log_probs.device), seen)
    return tokens, log_probs.gather(-1, tokens[:, None]).squeeze(-1)


def _settings(rows: Sequence[Running], device: torch.device) -> SamplingBatch:
    return SamplingBatch.of([row.request.sampling for row in rows], device)


def _seen(rows: Sequence[Running], log_probs: Tensor) -> Tensor:
    """(R, V), True for tokens that a row has already."""
    seen = torch.zeros(log_probs.shape, dtype=torch.bool)
    for index, row in enumerate(rows):
        seen[index, torch.tensor(row.text.tokens)] = True
    return to_device(seen, log_probs.device)
