"""Finding domains in a heap of documents: balanced EM with prices."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyper.data import Documents
from pyper.errors import DataError
from pyper.mixture.router import smoothed_log_probs
from pyper.routing import Assignment, assign_with_prices

# What EM reads: the beginning of documents, spread evenly over the data.
_EXCERPT_TOKENS = 1024
_SAMPLE_TOKENS = 1_500_000
# Restarts differ in their random start; the one with the best likelihood is kept.
_RESTARTS = 4


@dataclass(frozen=True)
class Excerpts:
    """The beginnings of some documents, laid end to end."""

    tokens: Tensor
    """(M,) int64."""
    document: Tensor
    """(M,) int64, which excerpt each token belongs to."""
    weights: Tensor
    """(N,) float64, tokens of the whole documents."""

    @property
    def n_documents(self) -> int:
        """N."""
        return len(self.weights)

    @property
    def lengths(self) -> Tensor:
        """(N,) tokens per excerpt."""
        return torch.bincount(self.document, minlength=self.n_documents)


@dataclass(frozen=True)
class Domains:
    """Domains that were found: a unigram language model and a price for each."""

    log_probs: Tensor
    """(E, V) float32."""
    prices: Tensor
    """(E,) nats per token."""
    log_likelihood: float
    """Nats per token of the sample, each document under its own domain."""
    history: list[float]
    """The same after every round."""


def read_excerpts(documents: Documents, selected: NDArray[np.int64] | None = None) -> Excerpts:
    """Beginnings of the selected documents (default: as many as fit the sample, evenly spread)."""
    if selected is None:
        lengths = np.minimum(documents.lengths, _EXCERPT_TOKENS)
        share = min(1.0, _SAMPLE_TOKENS / max(1, int(lengths.sum())))
        wanted = max(1, round(len(lengths) * share))
        selected = np.linspace(0, len(lengths) - 1, wanted).round().astype(np.int64)
    parts = [
        documents.read(int(i), 0, min(_EXCERPT_TOKENS, int(documents.lengths[i]))) for i in selected
    ]
    tokens = torch.from_numpy(np.concatenate(parts).astype(np.int64))
    document = torch.repeat_interleave(
        torch.arange(len(parts)), torch.tensor([len(part) for part in parts])
    )
    weights = torch.from_numpy(documents.lengths[selected]).double()
    return Excerpts(tokens, document, weights)


def unigram_scores(log_probs: Tensor, excerpts: Excerpts) -> Tensor:
    """Log-likelihoods (N, E) of whole documents under unigram models (E, V).

    The unread rest of a long document is taken to be like its beginning: only then do documents
    weigh in the balance what they weigh in training.
    """
    scores = torch.zeros(excerpts.n_documents, len(log_probs))
    for expert, table in enumerate(log_probs):
        scores[:, expert].index_add_(0, excerpts.document, table[excerpts.tokens])
    return scores * (excerpts.weights / excerpts.lengths.clamp(min=1)).float()[:, None]


def discover_unigram(
    documents: Documents, vocab_size: int, n_experts: int, *, rounds: int, random_seed: int
) -> Domains:
    """Balanced EM: unigram models per domain, then every document to the best at equal load.

    The best of several random starts. Raises DataError for fewer documents than experts.
    """
    if documents.n_documents < n_experts:
        raise DataError(
            f"{documents.n_documents} documents cannot be divided among {n_experts} experts",
            hint="lower `mixture.n_experts`, or cut the text with `--split-by blank-line`",
        )
    excerpts = read_excerpts(documents)
    starts = [
        _expectation_maximisation(excerpts, vocab_size, n_experts, rounds, random_seed + restart)
        for restart in range(_RESTARTS)
    ]
    return max(starts, key=lambda domains: domains.log_likelihood)


def _expectation_maximisation(
    excerpts: Excerpts, vocab_size: int, n_experts: int, rounds: int, random_seed: int
) -> Domains:
    weights = excerpts.weights
    log_probs = _random_start(excerpts, vocab_size, n_experts, random_seed)
    history: list[float] = []
    assignment: Assignment | None = None
    for _ in range(rounds):
        scores = unigram_scores(log_probs, excerpts)
        assignment = assign_with_prices(
            scores, weights=weights, prices=None if assignment is None else assignment.prices
        )
        chosen = scores.gather(1, assignment.expert[:, None])
        history.append(float(chosen.double().sum() / weights.sum()))
        log_probs = _fit(excerpts, assignment.expert, vocab_size, n_experts)
        if len(history) > 1 and history[-1] - history[-2] < 1e-5:
            break
    assert assignment is not None
    return Domains(log_probs, assignment.prices, history[-1], history)


def _random_start(excerpts: Excerpts, vocab_size: int, n_experts: int, random_seed: int) -> Tensor:
    """Unigram models of documents that are unlike each other (k-means++ seeding).

    The next one is drawn in proportion to how badly, in nats per token above its best, it is
    described by those already taken.
    """
    generator = torch.Generator().manual_seed(random_seed)
    lengths = excerpts.lengths.clamp(min=1)
    everything = torch.bincount(excerpts.tokens, minlength=vocab_size)
    taken: list[Tensor] = []
    # Short documents say little: draw among the longer half.
    eligible = (lengths >= lengths.median()).float()
    doubt = eligible
    for _ in range(n_experts):
        seed = int(torch.multinomial(doubt, 1, generator=generator))
        counts = torch.bincount(
            excerpts.tokens[excerpts.document == seed], minlength=vocab_size
        ).double()
        # A third of the weight on the whole sample keeps every token possible.
        taken.append(counts / counts.sum() + 0.5 * everything / everything.sum())
        log_probs = torch.stack([(t / t.sum()).log().float() for t in taken])
        scores = unigram_scores(log_probs, excerpts) / excerpts.weights.float()[:, None]
        best = scores.max(dim=1).values
        doubt = eligible * (best.max() - best + 1e-6)
    return log_probs


def _fit(excerpts: Excerpts, expert: Tensor, vocab_size: int, n_experts: int) -> Tensor:
    """Maximisation: smoothed frequencies (E, V) of the assigned documents."""
    cell = expert[excerpts.document] * vocab_size + excerpts.tokens
    counts = torch.bincount(cell, minlength=n_experts * vocab_size)
    return smoothed_log_probs(counts.view(n_experts, vocab_size).double()).float()


def assign_documents(domains: Domains, documents: Documents, *, balanced: bool) -> Assignment:
    """Every document's domain. `balanced` (training data): equal tokens per expert; otherwise
    (held-out data) each goes by its score less the prices found in training."""
    chunks = np.array_split(np.arange(documents.n_documents), max(1, documents.n_documents // 4096))
    # The empty one in front: a split without documents is no special case.
    scores = torch.cat(
        [torch.empty(0, len(domains.prices))]
        + [unigram_scores(domains.log_probs, read_excerpts(documents, c)) for c in chunks if len(c)]
    )
    lengths = torch.from_numpy(documents.lengths).double()
    if balanced:
        return assign_with_prices(scores, weights=lengths, prices=domains.prices)
    expert = (scores.double() - lengths[:, None] * domains.prices).argmax(dim=1)
    load = torch.zeros(len(domains.prices), dtype=torch.float64).index_add_(0, expert, lengths)
    return Assignment(expert, domains.prices, load / load.sum().clamp_min(1))
