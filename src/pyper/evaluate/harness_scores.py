"""What a mixture says of given texts, teacher-forced: many at a time, a common context read once.

The weights at every position are those of the mixture's rule, from the tokens before it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyper.errors import PromptError
from pyper.evaluate.harness_plan import Ask, Batch, batches_of
from pyper.mixture import Mixture
from pyper.mixture.mixing import mixing_log_weights
from pyper.nn import CachePass, KVStore, Transformer
from pyper.routing import mix_log_probs

# Log-probabilities that are in memory at a time: 2²⁵ of them are 128 MB.
_LOGITS_AT_ONCE = 2**25


@dataclass(frozen=True)
class Answer:
    """What the mixture says of one continuation."""

    log_probs: Tensor
    """(n,) float32 on the CPU, nats, of each of its n tokens."""
    is_greedy: bool | None
    """Whether each of them is the likeliest one; None where it was not asked."""


@torch.no_grad()
def score(
    mixture: Mixture,
    asks: Sequence[Ask],
    *,
    batch_tokens: int = 8192,
    greedy: bool = True,
    on_done: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Answers in the order of the questions, read `batch_tokens` tokens at a time.

    greedy: also say whether continuations are what the mixture holds likeliest (costs the head once
    more). on_done: told after each batch how many questions it answered. Raises PromptError for
    what is longer than the context.
    """
    _check_lengths(asks, mixture.settings.seq_len)
    answers: dict[int, Answer] = {}
    for batch in batches_of(asks, batch_tokens):
        answers |= zip(batch.places, _answer(mixture, batch, greedy), strict=True)
        if on_done is not None:
            on_done(len(batch.places))
    return [answers[place] for place in range(len(asks))]


def _check_lengths(asks: Sequence[Ask], context: int) -> None:
    longest = max((len(ask.read) for ask in asks), default=0)
    if longest > context:
        raise PromptError(
            f"{longest:,} tokens do not fit the context of {context:,}",
            hint="cut them into `rolling_windows`, or leave out their beginning",
        )


@torch.no_grad()
def final_weights(mixture: Mixture, tokens: Sequence[int]) -> list[float]:
    """The weights (E,) with which the mixture predicts what comes after `tokens`."""
    # Which token is asked for does not matter: no weight looks at it.
    [batch] = batches_of([Ask(tuple(tokens), tuple(tokens[:1]))], len(tokens))
    weights: list[float] = _Reading(mixture, batch).log_weights[0, -1].exp().tolist()
    return weights


def rolling_windows(tokens: Sequence[int], bos_id: int, context: int) -> list[Ask]:
    """Questions that ask for every token of a text once, with as much context as there is room.

    The first begins with `bos_id`; a last one that is shorter sees more of what came before. The
    same windows as lm-evaluation-harness'.
    """
    text = (bos_id, *tokens)
    asks = []
    for start in range(1, len(text), context):
        stop = min(start + context, len(text))
        asks.append(Ask(text[max(0, stop - context - 1) : start], text[start:stop]))
    return asks


def _answer(mixture: Mixture, batch: Batch, greedy: bool) -> list[Answer]:
    reading = _Reading(mixture, batch)
    scores = mix_log_probs(reading.log_weights, reading.scores).float().cpu()  # (B, T)
    is_best = reading.is_best().cpu() if greedy else None
    return [
        Answer(
            scores[row, ask.asked],
            None if is_best is None else bool(is_best[row, ask.asked].all()),
        )
        for row, ask in enumerate(batch.asks)
    ]


class _Reading:
    """The experts' passes over one batch: B questions, padded on the right to T predictions."""

    def __init__(self, mixture: Mixture, batch: Batch) -> None:
        self.mixture, self.batch = mixture, batch
        self._states: list[Tensor] = []
        by_expert = [self._read(mixture.expert(e)) for e in range(mixture.n_experts)]
        self._index = batch.index.to(by_expert[0].device)
        self.scores = torch.stack(by_expert, dim=-1)[self._index]
        """(B, T, E), log p of the token after each one."""
        self.log_weights = mixing_log_weights(mixture.settings, self.scores, self._router_scores())
        """(B, T, E)."""

    def _read(self, model: Transformer) -> Tensor:
        """log p (N,) of the token after each of the N that are read; the states (N, D) are kept."""
        batch, device = self.batch, model.device
        store = KVStore.allocate(model.config, batch.n_pages, device=device, dtype=model.dtype)
        states = [
            model.read_cached(tokens.to(device), CachePass.plan(store, chunks))
            for tokens, chunks in batch.passes
        ]
        self._states.append(torch.cat(states))
        targets = batch.targets.to(device)
        scores = [
            self._said(model, -1, part).gather(-1, targets[part, None]).squeeze(-1)
            for part in self._parts(len(targets), n_each=1)
        ]
        return torch.cat(scores)

    def _said(self, model: Transformer, expert: int, rows: slice | Tensor) -> Tensor:
        """log p (n, V) of an expert after some of the tokens."""
        logits: Tensor = model.head(self._states[expert][rows])
        return logits.float().log_softmax(dim=-1)

    def _parts(self, n: int, n_each: int) -> Iterator[slice]:
        """n rows in parts, where each row takes `n_each` times the vocabulary."""
        vocab_size = self.mixture.expert(0).config.vocab_size
        step = max(1, _LOGITS_AT_ONCE // (vocab_size * n_each))
        return (slice(start, start + step) for start in range(0, n, step))

    def _router_scores(self) -> Tensor:
        router = self.mixture.router
        if router is None:
            return self.scores
        tokens = self.batch.tokens.to(self.scores.device)
        parts = self._parts(len(tokens), n_each=tokens.shape[1])  # it may be language models
        return torch.cat([router.token_scores(tokens[part]) for part in parts])

    def is_best(self) -> Tensor:
        """(B, T), whether the mixture holds no token likelier than the one that comes.

        False where nothing is asked.
        """
        asked = self.batch.asked.to(self._index.device)
        flat, weights = self._index[asked], self.log_weights[asked]  # (n,), (n, E)
        parts = self._parts(len(flat), self.mixture.n_experts)
        best = torch.cat([self._best(flat[part], weights[part]) for part in parts])
        is_best = torch.zeros_like(asked)
        is_best[asked] = best == self.batch.targets.to(flat.device)[flat]
        return is_best

    def _best(self, flat: Tensor, log_weights: Tensor) -> Tensor:
        """The mixture's likeliest tokens (n,), by the experts that have any weight."""
        used = torch.isfinite(log_weights).any(dim=0).nonzero().squeeze(-1).tolist()
        said = [self._said(self.mixture.expert(e), e, flat) for e in used]
        return mix_log_probs(log_weights[:, used], torch.stack(said, dim=-2)).argmax(dim=-1)
