"""Tokens are drawn where the predictions are; the host hears of them in one small copy."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pyper.generate.mixture_reader import Predictions
from pyper.generate.running import Alternatives, Running
from pyper.generate.sampling import SamplingBatch, SamplingConfig, draw
from pyper.generate.transfer import to_device


@dataclass(frozen=True)
class Draw:
    """One token for each of some rows (R), perhaps still on its way to the host."""

    rows: list[Running]
    experts: list[list[int]]
    """(R, A), those that had read the row."""
    tokens: Tensor
    """(R,), where they were drawn."""
    scores: Tensor
    """(R, A), the experts' log-probabilities of the tokens, likewise."""
    _numbers: Tensor
    """(R, 2 + A) float64 on the host: token, its log-probability, that of each expert."""
    _arrived: torch.cuda.Event | None
    _best: tuple[Tensor, Tensor] | None

    def numbers(self) -> list[list[float]]:
        """Token, its log-probability, and that of each expert, by row; waits for them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        rows: list[list[float]] = self._numbers.tolist()
        return rows

    def alternatives(self) -> list[Alternatives]:
        """The likeliest tokens of each row, as many as it asked for."""
        if self._best is None:
            return [()] * len(self.rows)
        log_probs, tokens = (part.tolist() for part in self._best)
        wanted = [row.request.n_logprobs for row in self.rows]
        return [
            tuple(zip(tokens[i][:n], log_probs[i][:n], strict=True)) for i, n in enumerate(wanted)
        ]


def draw_tokens(rows: list[Running], predictions: Predictions, n_tokens: int) -> Draw:
    """Draw a token for each row, without waiting for a GPU.

    n_tokens: of the tokenizer; a model's tables may be longer, and no text has those entries.
    """
    log_probs = predictions.log_probs[:, :n_tokens]
    batch = _settings(tuple(row.request.sampling for row in rows), log_probs.device)
    chance = torch.cat([torch.rand(1, generator=row.chance) for row in rows])
    seen = None if batch.repetition_penalty is None else _seen(rows, log_probs)
    tokens = draw(log_probs, batch, to_device(chance, log_probs.device), seen)
    of_mixture = log_probs.gather(-1, tokens[:, None])
    n_experts = predictions.per_expert.shape[1]
    index = tokens[:, None, None].expand(-1, n_experts, 1)
    of_experts = predictions.per_expert.gather(-1, index).squeeze(-1)
    numbers = torch.cat([part.double() for part in (tokens[:, None], of_mixture, of_experts)], 1)
    n_best = max(row.request.n_logprobs for row in rows)
    best = None
    if n_best:
        top = log_probs.topk(n_best, dim=-1)
        best = top.values, top.indices
    return Draw(rows, predictions.experts, tokens, of_experts, *_to_host(numbers), best)


def _to_host(x: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    if x.device.type != "cuda":
        return x, None
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    host.copy_(x, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived


@lru_cache(maxsize=64)
def _settings(configs: tuple[SamplingConfig, ...], device: torch.device) -> SamplingBatch:
    """The same rows as a rule draw many times."""
    return SamplingBatch.of(configs, device)


def _seen(rows: Sequence[Running], log_probs: Tensor) -> Tensor:
    """(R, V), True for tokens that a row has already."""
    seen = torch.zeros(log_probs.shape, dtype=torch.bool)
    for index, row in enumerate(rows):
        seen[index, torch.tensor(row.text.tokens)] = True
    return seen.to(log_probs.device)
