"""One expert reads the new tokens of many texts in one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from pyper.generate.mixing_state import MixingState
from pyper.generate.pages import Page, PagePool
from pyper.nn import PAGE_TOKENS, CachePass, Chunk, KVStore, Transformer
from pyper.nn.kv_cache import ROW_TILE

# Rows of logits at a time: those of a long prompt would take more memory than the model.
_LOGIT_ROWS = 32 * ROW_TILE


@dataclass(eq=False)
class Reading:
    """What one expert has read of one text."""

    expert: int
    pages: list[int] = field(default_factory=list)
    published: list[Page] = field(default_factory=list)
    """The full pages, as others know them."""
    n_read: int = 0
    n_scored: int = 1
    """Tokens whose scores are known (the first has none)."""
    last: Tensor | None = None
    """(V,), log p of the token after those that were read."""
    ahead: list[Tensor] = field(default_factory=list)
    """Likewise after each of the text's guesses, should they come true."""


@dataclass(eq=False)
class Text:
    """A prompt and what was written after it."""

    tokens: list[int]
    capacity: int
    """The most tokens that it will have."""
    state: MixingState
    readings: dict[int, Reading] = field(default_factory=dict)
    weights: tuple[float, ...] | None = None
    """(E,), of the next prediction, once they are known."""
    guesses: list[int] = field(default_factory=list)
    """Tokens that may come next, and are read on trial."""

    @property
    def live(self) -> list[int]:
        """Experts that may still be needed."""
        return [expert for expert, is_live in enumerate(self.state.live) if is_live]

    @property
    def known_weights(self) -> tuple[float, ...]:
        """Of the next prediction; they must be known."""
        assert self.weights is not None
        return self.weights

    @property
    def used(self) -> list[int]:
        """Experts with a share in the next prediction, whose weights are known."""
        return [expert for expert, weight in enumerate(self.known_weights) if weight > 0]

    def is_read_by(self, expert: int) -> bool:
        """Whether an expert has read all of it."""
        reading = self.readings.get(expert)
        return reading is not None and reading.n_read == len(self.tokens)

    def check_guess(self, token: int) -> bool:
        """Once the next token is known: if it was guessed, what comes after it has been read."""
        is_right = token == self.guesses[0]
        for reading in self.readings.values():
            if reading.ahead and is_right:
                reading.last = reading.ahead.pop(0)
                reading.n_read += 1
            else:
                reading.ahead.clear()
        self.guesses = self.guesses[1:] if is_right else []
        return is_right


@dataclass(frozen=True)
class Job:
    """An expert is to read a text up to its first `upto` tokens."""

    text: Text
    reading: Reading
    upto: int
    guesses: Sequence[int] = ()
    """Tokens after those, read on trial."""

    @property
    def tokens(self) -> list[int]:
        """Of the pass."""
        return [*self.text.tokens[self.start : self.upto], *self.guesses]

    @property
    def n_held(self) -> int:
        """1 where the last token of shared pages is read once more: what it says of the next token
        depends on the next token, and no page can know that."""
        reading = self.reading
        unknown = reading.n_scored <= reading.n_read < self.text.state.n_scored
        return int(reading.n_read > 0 and unknown)

    @property
    def start(self) -> int:
        """The first token of the pass."""
        return self.reading.n_read - self.n_held

    @property
    def n_new(self) -> int:
        """Tokens of the pass."""
        return self.upto - self.start + len(self.guesses)


def begin_reading(expert: int, text: Text, pool: PagePool, upto: int) -> Reading:
    """Start with the pages, up to `upto` tokens, in which another text began alike.

    At least one token stays unread: what follows it is not in the pages.
    """
    state, known = text.state, text.tokens[: min(upto, len(text.tokens) - 1)]
    shared = pool.find(expert, known, scored=state.n_scored)
    for number, page in enumerate(shared):
        if page.scores is not None:
            at = slice(number * PAGE_TOKENS, (number + 1) * PAGE_TOKENS)
            state.scores[at, expert] = page.scores
    n_read = len(shared) * PAGE_TOKENS
    numbers = [page.number for page in shared]
    return Reading(expert, numbers, shared, n_read, n_scored=max(1, n_read))


def read(model: Transformer, store: KVStore, pool: PagePool, jobs: Sequence[Job]) -> None:
    """Run the jobs of one expert in one pass; each reading then knows its next prediction."""
    jobs = sorted(jobs, key=lambda job: job.n_new)  # equal lengths share one attention
    for job in jobs:
        take_pages(job.reading, job.upto + len(job.guesses), pool)
    chunks = [Chunk(job.reading.pages, job.start, job.n_new, job.n_held) for job in jobs]
    tokens = [token for job in jobs for token in job.tokens]
    states = model.read_cached(torch.tensor(tokens).to(model.device), CachePass.plan(store, chunks))
    conclude(model, states, jobs, pool)


def conclude(model: Transformer, states: Tensor, jobs: Sequence[Job], pool: PagePool) -> None:
    """Jobs that were read: what the final states (N, D) of their tokens say of the next ones."""
    _predict(model, states, jobs)
    for job in jobs:
        job.reading.n_read = job.upto
        publish(job.text, job.reading, pool)


def take_pages(reading: Reading, upto: int, pool: PagePool) -> None:
    """Room for the first `upto` tokens."""
    pages = reading.pages
    pages.extend(pool.take() for _ in range(-(-upto // PAGE_TOKENS) - len(pages)))


def _predict(model: Transformer, states: Tensor, jobs: Sequence[Job]) -> None:
    """What is said of the token after each chunk, and of the tokens in it as far as it matters."""
    rows: list[int] = []
    targets: list[int] = []
    scored: list[tuple[int, range]] = []
    ends: list[int] = []
    at = 0
    for job in jobs:
        tokens, first = job.text.tokens, max(job.reading.n_scored, job.start + 1)
        positions = range(first, min(len(tokens), job.text.state.n_scored, job.upto + 1))
        scored.append((len(rows), positions))
        rows.extend(at + position - 1 - job.start for position in positions)
        targets.extend(tokens[positions.start : positions.stop])
        # After the last token, and after each guess: whatever comes next.
        asked = range(at + job.upto - 1 - job.start, at + job.n_new)
        ends.extend(range(len(rows), len(rows) + len(asked)))
        rows.extend(asked)
        targets.extend([-1] * len(asked))
        at += job.n_new
    scores, said = _log_probs(model, states, rows, targets, ends)
    for job, (begin, positions) in zip(jobs, scored, strict=True):
        job.reading.last, *job.reading.ahead = said[: 1 + len(job.guesses)]
        del said[: 1 + len(job.guesses)]
        if positions:
            column = job.text.state.scores[:, job.reading.expert]
            column[positions.start : positions.stop] = scores[begin : begin + len(positions)]
            job.reading.n_scored = positions.stop


def _log_probs(
    model: Transformer, states: Tensor, rows: list[int], targets: list[int], ends: list[int]
) -> tuple[list[float], list[Tensor]]:
    """Log-probabilities of `targets` after the states `rows`; all of them (V,) at `ends`."""
    scores: list[float] = []
    last: list[Tensor] = []
    is_asked = any(target >= 0 for target in targets)
    for start in range(0, len(rows), _LOGIT_ROWS):
        part = slice(start, start + _LOGIT_ROWS)
        index = torch.tensor(rows[part]).to(states.device)
        whole_tiles = F.pad(states[index], (0, 0, 0, -len(index) % ROW_TILE))
        log_probs = model.head(whole_tiles).float().log_softmax(dim=-1)[: len(index)]
        if is_asked:
            target = torch.tensor(targets[part]).clamp(min=0).to(states.device)
            scores += log_probs.gather(1, target[:, None]).squeeze(1).tolist()
        else:  # a GPU need not be waited for
            scores += [0.0] * len(index)
        here = [end - start for end in ends if start <= end < part.stop]
        kept = torch.tensor(here, dtype=torch.long)  # also where there are none
        last += log_probs[kept.to(states.device)].unbind()
    return scores, last


def publish(text: Text, reading: Reading, pool: PagePool) -> None:
    """Full pages become readable for texts that begin alike."""
    state = text.state
    n_known = min(reading.n_read, len(text.tokens))
    for number in range(len(reading.published), n_known // PAGE_TOKENS):
        at = slice(number * PAGE_TOKENS, (number + 1) * PAGE_TOKENS)
        known = min(at.stop, state.n_scored) <= reading.n_scored
        scores = tuple(state.scores[at, reading.expert].tolist()) if known else None
        before, tokens = reading.published, text.tokens[at]
        page = pool.publish(reading.expert, before, reading.pages[number], tokens, scores)
        before.append(page)
