"""Tokens are drawn where the predictions are; the host hears of them in small copies."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyper.generate.mixture_reader import Predictions
from pyper.generate.running import Alternatives, Running
from pyper.generate.sampling import SamplingBatch, draw
from pyper.generate.transfer import OnItsWay, to_device, to_host
from pyper.kernels import drawing


class Drawn(NamedTuple):
    """One token of one row, and what was said of it."""

    token: int
    log_prob: float
    scores: list[float]
    """(A,), the experts' log-probabilities."""
    alternatives: Alternatives
    """The likeliest tokens, as many as the row asked for."""


@dataclass(frozen=True)
class Draw:
    """One token for each of some rows (R), perhaps still on its way to the host."""

    rows: list[Running]
    experts: list[list[int]]
    """(R, A), those that had read the row."""
    settings: SamplingBatch
    """Of the rows."""
    tokens: Tensor
    """(R,), where they were drawn."""
    scores: Tensor
    """(R, A), the experts' log-probabilities of the tokens, likewise."""
    _coming: OnItsWay
    """Tokens (R,), their log-probabilities (R,); then scores, then the likeliest, if not those."""
    _n_best: int

    def outcomes(self) -> list[Drawn]:
        """By row; waits for them."""
        tokens, log_probs, *more = (part.tolist() for part in self._coming.wait())
        scores = more.pop(0) if self.scores.shape[1] > 1 else [[said] for said in log_probs]
        others: list[Alternatives] = [()] * len(self.rows)
        if self._n_best:
            wanted = [row.request.n_logprobs for row in self.rows]
            pairs = zip(wanted, *more, strict=True)
            others = [tuple(zip(best[:n], values[:n], strict=True)) for n, best, values in pairs]
        return [Drawn(*row) for row in zip(tokens, log_probs, scores, others, strict=True)]


def draw_tokens(
    rows: list[Running],
    predictions: Predictions,
    n_tokens: int,
    settings: SamplingBatch | None = None,
) -> Draw:
    """Draw a token for each row, without waiting for a GPU.

    n_tokens: of the tokenizer; a model's tables may be longer, and no text has those entries.
    settings: of the rows, where they are known from the last draw.
    """
    log_probs = predictions.log_probs[:, :n_tokens]
    if settings is None:
        settings = SamplingBatch.of([row.request.sampling for row in rows], log_probs.device)
    tokens, of_mixture = _draw(rows, log_probs, settings)
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
    experts = predictions.experts
    return Draw(rows, experts, settings, tokens, of_experts, to_host(*coming), n_best)


def _draw(
    rows: Sequence[Running], log_probs: Tensor, settings: SamplingBatch
) -> tuple[Tensor, Tensor]:
    """Tokens (R,) and their log-probabilities (R,), of log_probs (R, V)."""
    if settings.is_greedy and settings.repetition_penalty is None:
        best = log_probs.max(dim=-1)
        return best.indices, best.values
    chance = to_device(torch.tensor([next(row.chance) for row in rows]), log_probs.device)
    if settings.repetition_penalty is None and drawing.takes(log_probs):
        return drawing.draw_rows(log_probs, settings.rules, chance)
    seen = None if settings.repetition_penalty is None else _seen(rows, log_probs)
    tokens = draw(log_probs, settings, chance, seen)
    return tokens, log_probs.gather(-1, tokens[:, None]).squeeze(-1)


def _seen(rows: Sequence[Running], log_probs: Tensor) -> Tensor:
    """(R, V), True for tokens that a row has already."""
    seen = torch.zeros(log_probs.shape, dtype=torch.bool)
    for index, row in enumerate(rows):
        seen[index, torch.tensor(row.text.tokens)] = True
    return seen.to(log_probs.device)
