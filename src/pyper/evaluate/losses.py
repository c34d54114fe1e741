"""Held-out loss of one model, by domain."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pyper.data import Documents, Packing
from pyper.nn import Transformer

# Tokens per forward pass: enough to fill a GPU, small enough that logits of 32k entries fit.
_TOKENS_PER_PASS = 8192
_WINDOWS_AT_ONCE = 1024


@dataclass(frozen=True)
class HeldOut:
    """Windows of one domain's held-out text: `tokens` (N, T + 1), and its mean bytes per token."""

    domain: str
    tokens: Tensor
    bytes_per_token: float
    weights: Tensor | None = None
    """(N, T) float32 of the predictions, 1 for those that count (answers in chats), else 0."""

    @property
    def n_scored(self) -> int:
        """Predictions that count: T per window where there are no weights."""
        if self.weights is not None:
            return int(self.weights.sum())
        return self.tokens.shape[0] * (self.tokens.shape[1] - 1)


def held_out_windows(documents: Documents, seq_len: int, max_tokens: int) -> list[HeldOut]:
    """Each domain's documents, in order, cut into windows of `seq_len` predictions.

    At most `max_tokens` predictions per domain, spread evenly over the windows. A domain with less
    than one window is left out, as are windows of chats without an answer.
    """
    windows = []
    for index, domain in enumerate(documents.domains):
        members = np.flatnonzero(documents.domain_index == index)
        own = documents.select(members)
        if own.n_tokens <= seq_len:
            continue
        packing = Packing(own, seq_len=seq_len, random_seed=0, epoch=0, shuffle=False)
        scored = _scored_windows(packing)
        if len(scored) == 0:
            continue
        wanted = max(1, min(len(scored), max_tokens // seq_len))
        picked = scored[np.linspace(0, len(scored) - 1, wanted).round().astype(np.int64)]
        tokens = torch.from_numpy(packing.sequences(picked))
        weights = packing.weights(picked)
        ratio = float(own.n_bytes.sum()) / own.n_tokens
        windows.append(
            HeldOut(
                domain,
                tokens,
                ratio,
                None if weights is None else torch.from_numpy(weights).float(),
            )
        )
    return windows


def _scored_windows(packing: Packing) -> NDArray[np.int64]:
    """The windows in which something is predicted that counts."""
    everything = np.arange(packing.n_sequences)
    parts = np.array_split(everything, 1 + len(everything) // _WINDOWS_AT_ONCE)
    found = [(part, packing.weights(part)) for part in parts]
    return np.concatenate([p if w is None else p[w.any(axis=1)] for p, w in found])


@torch.no_grad()
def token_losses(model: Transformer, tokens: Tensor) -> Tensor:
    """Nats of every prediction (N, T) float32 on CPU, for windows (N, T + 1)."""
    losses = [_losses_of(model, part) for part in passes(tokens, model)]
    return torch.cat(losses)


def passes(tokens: Tensor, model: Transformer) -> Iterator[Tensor]:
    """Windows (N, T + 1) in parts that fit one forward pass, on the model's device."""
    rows = max(1, _TOKENS_PER_PASS // tokens.shape[1])
    for part in tokens.split(rows):
        yield part.to(model.device, non_blocking=True)


def _losses_of(model: Transformer, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1]).flatten(0, 1).float()
    losses = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
    return losses.view(len(tokens), -1).cpu()


def domain_losses(model: Transformer, held_out: list[HeldOut]) -> dict[str, float]:
    """Mean nats per token of each domain, over the predictions that count."""
    return {h.domain: _mean_of(token_losses(model, h.tokens), h) for h in held_out}


def _mean_of(losses: Tensor, held_out: HeldOut) -> float:
    if held_out.weights is None:
        return float(losses.double().mean())
    return float((losses.double() * held_out.weights).sum() / held_out.n_scored)


def mean_loss(by_domain: dict[str, float], held_out: list[HeldOut]) -> float:
    """Mean over all predictions: domains count by their tokens."""
    total = sum(h.n_scored for h in held_out)
    return sum(by_domain[h.domain] * h.n_scored for h in held_out) / max(1, total)
