"""A mixture reads many texts side by side: which experts run, and how they are mixed."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from pyper.generate.expert_passes import ExpertPasses
from pyper.generate.mixing_state import (
    MixingState,
    evidence_of,
    posterior_log_weights,
    posterior_of,
)
from pyper.generate.pages import PagePool
from pyper.generate.predictions import Predictions, mixed
from pyper.generate.reading import Job, Reading, Text, begin_reading
from pyper.generate.speculation import Drafter
from pyper.generate.transfer import to_device
from pyper.mixture import Mixture
from pyper.nn import PAGE_TOKENS
from pyper.nn.kv_cache import ROW_TILE
from pyper.routing import mix_log_probs

# With the last token they fill a tile of rows: on a CPU they are read for nothing.
N_GUESSES = ROW_TILE - 1


class MixtureReader:
    """Texts grow token by token, each under the mixture's rule; experts read them in batches.

    A text's predictions do not depend on the other texts, on a CPU to the last bit.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        cache_tokens: int,
        prefill_chunk: int | None,
        compiled: bool = False,
        fixed_shapes: bool | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        """prefill_chunk: see `EngineLimits`.

        compiled: decoding steps go through `torch.compile` (on a GPU: faster, after a minute).
        fixed_shapes: single tokens are read in fixed shapes; None: on a GPU, where those are
        recorded as CUDA graphs. On a CPU that costs the last bits' independence of neighbours.
        """
        self.mixture, self.prefill_chunk = mixture, prefill_chunk
        self.pool = PagePool(cache_tokens // PAGE_TOKENS)
        self._passes = ExpertPasses(
            mixture, self.pool, compiled=compiled, fixed_shapes=fixed_shapes
        )
        self.n_prefilled = self.n_reused = self.n_guessed = self.n_accepted = 0
        self.drafter, self.may_guess = drafter, True
        n = mixture.n_experts
        self._one_expert = [tuple(float(e == chosen) for e in range(n)) for chosen in range(n)]

    def pages_for(self, n_tokens: int, capacity: int, pinned: int | None) -> int:
        """The most pages that a text may come to use, `n_tokens` into it."""
        settings, whole = self.mixture.settings, -(-capacity // PAGE_TOKENS)
        n_experts = self.mixture.n_experts
        if pinned is not None or n_experts == 1:
            return whole
        if settings.mixing != "top1":
            return n_experts * whole
        if n_tokens > settings.prefix_tokens and self.mixture.router is not None:
            return whole
        cold = min(capacity, settings.prefix_tokens + 1)
        return whole + (n_experts - 1) * -(-cold // PAGE_TOKENS)

    def pages_left_for(self, text: Text) -> int:
        """The most pages that an open text may come to use from now on."""
        whole, state = -(-text.capacity // PAGE_TOKENS), text.state
        if self.mixture.settings.mixing == "posterior":
            return sum(state.live) * whole
        if state.is_settled(len(text.tokens)) and text.weights is not None:
            return whole
        return self.pages_for(len(text.tokens), text.capacity, state.pinned)

    def open(self, tokens: Sequence[int], capacity: int, pinned: int | None = None) -> Text:
        """A text of at most `capacity` tokens; nothing is read yet."""
        return Text(list(tokens), capacity, MixingState(self.mixture, capacity, pinned))

    def close(self, text: Text) -> None:
        """Give its pages back."""
        for expert in list(text.readings):
            self._forget(text, expert)

    def advance(self, texts: Sequence[Text]) -> list[Text]:
        """Read what is due, long prompts in part; those whose next token can be predicted."""
        budget: dict[int, int] = {}
        for text in texts if self.drafter is not None and self.may_guess else ():
            self._guess(text)
        # 1. what the rule needs to know of every expert
        self._read(
            [(t, e, t.state.n_evidence(len(t.tokens))) for t in texts for e in t.live], budget
        )
        known = [t for t in texts if self._has_evidence(t)]
        # 2. the rule
        self._weigh(known)
        # 3. the experts that write, where they have not read everything yet
        self._read([(t, e, len(t.tokens)) for t in known for e in t.used], budget)
        return [t for t in known if all(t.is_read_by(e) for e in t.used)]

    def predict(self, texts: Sequence[Text]) -> list[Predictions]:
        """log p(next token) of texts that `advance` called ready."""
        with_experts = [(t, [e for e in t.live if t.is_read_by(e)]) for t in texts]
        # As many experts in every text: sums over a padded axis could differ in the last bit.
        with_experts.sort(key=lambda pair: len(pair[1]))
        return [mixed(list(g)) for _, g in groupby(with_experts, key=lambda pair: len(pair[1]))]

    def read_ahead(
        self, texts: Sequence[Text], tokens: Tensor, experts: list[list[int]], scores: Tensor
    ) -> Predictions | None:
        """Predictions after one more token (R,) in each text, which only the device knows yet.

        experts, scores: (R, A), who had read the texts, and what they say of the tokens. The
        caller draws from them before anything else is read, and appends the tokens later. None
        where what comes next depends on them.
        """
        is_guessing = self.drafter is not None and self.may_guess  # one way to hurry at a time
        if is_guessing or not all(self._goes_on(text) for text in texts):
            return None
        self._weigh(texts)
        now = [self._next_readers(text) for text in texts]
        asked = sorted({expert for es in now for expert in es})
        if len({len(es) for es in now}) > 1 or not all(map(self._passes.is_quick, asked)):
            return None
        per_expert = self._read_one_more(texts, tokens, now)
        if per_expert.shape[1] == 1:
            return Predictions(list(texts), now, per_expert[:, 0], per_expert)
        weights = self._weights_ahead(texts, experts, scores)
        if per_expert.shape[1] < weights.shape[1]:
            weights = weights.gather(1, _index(now, weights))
        return Predictions(list(texts), now, mix_log_probs(weights, per_expert), per_expert)

    def _read_one_more(self, texts: Sequence[Text], tokens: Tensor, now: list[list[int]]) -> Tensor:
        """log p (R, A, V) after tokens (R,), by the experts `now` (R, A) of each text."""
        said, order = [], list[tuple[int, int]]()
        readers = sorted({e for es in now for e in es})
        for expert in readers:
            rows = [i for i, es in enumerate(now) if expert in es]
            part = tokens if len(rows) == len(texts) else tokens[_index(rows, tokens)]
            readings = [(texts[i], texts[i].readings[expert]) for i in rows]
            here = self._passes.read_ahead(expert, readings, part)
            # Recorded steps of all experts share their memory: the next expert overwrites it.
            said.append(here if len(readers) == 1 else here.clone())
            order += [(i, expert) for i in rows]
        if all(len(part) == len(texts) for part in said):
            return said[0].unsqueeze(1) if len(said) == 1 else torch.stack(said, dim=1)
        place = {pair: at for at, pair in enumerate(order)}
        index = [[place[i, e] for e in es] for i, es in enumerate(now)]
        return torch.cat(said)[_index(index, tokens)]

    def _goes_on(self, text: Text) -> bool:
        """Whether it is known who reads the next token, whatever it is, and they are ready."""
        if text.guesses:
            return False
        if text.state.stays_decided(len(text.tokens)):
            return all(map(text.is_read_by, text.used))
        return text.state.settings.mixing == "posterior" and all(map(text.is_read_by, text.live))

    def _next_readers(self, text: Text) -> list[int]:
        return text.used if text.state.stays_decided(len(text.tokens)) else text.live

    def _weights_ahead(
        self, texts: Sequence[Text], experts: list[list[int]], scores: Tensor
    ) -> Tensor:
        """Log weights (R, E) once the posterior has seen the scores (R, A) of one more token."""
        settings, device = self.mixture.settings, scores.device
        evidence, live = (to_device(x, device) for x in evidence_of([t.state for t in texts]))
        more = settings.temperature * scores.double()
        evidence = evidence.scatter_add(1, _index(experts, evidence), more)
        # float32, as where the host knows them: all that is mixed would be float64 as well.
        return posterior_log_weights(settings, evidence, live)[0].float()

    def append(
        self, text: Text, token: int, experts: Sequence[int], scores: Sequence[float]
    ) -> None:
        """Add one token, of which the experts said log p = scores."""
        for expert, score in zip(experts, scores, strict=True):
            if expert in text.readings:  # else it was dropped while the token was under way
                text.state.scores[len(text.tokens), expert] = score
                text.readings[expert].n_scored = len(text.tokens) + 1
        if text.guesses:
            self.n_accepted += text.check_guess(token)
        text.tokens.append(token)

    def _guess(self, text: Text) -> None:
        """Guess what comes after the last token, where that is all there is to read."""
        n = len(text.tokens)
        most = min(N_GUESSES, text.capacity - 1 - n)
        if text.guesses or most < 1:
            return
        if any(reading.n_read == n - 1 for reading in text.readings.values()):
            assert self.drafter is not None
            text.guesses = self.drafter.guess(text, most)
            self.n_guessed += len(text.guesses)

    def _has_evidence(self, text: Text) -> bool:
        due = text.state.n_evidence(len(text.tokens))
        return due == 0 or all(
            e in text.readings and text.readings[e].n_read >= due for e in text.live
        )

    def _weigh(self, texts: Sequence[Text]) -> None:
        undecided = []
        for text in texts:
            decided = text.state.decided(text.tokens)
            if decided is None:
                text.state.take_in(len(text.tokens))
                undecided.append(text)
            else:
                text.weights = self._one_expert[decided]
                if text.state.is_settled(len(text.tokens)):
                    text.state.live = [weight > 0 for weight in text.weights]
        if undecided:
            weights = posterior_of([t.state for t in undecided]).tolist()
            for text, row in zip(undecided, weights, strict=True):
                text.weights = tuple(row)
        for text in texts:
            for expert in [e for e in text.readings if not text.state.live[e]]:
                self._forget(text, expert)

    def _read(self, due: Sequence[tuple[Text, int, int]], budget: dict[int, int]) -> None:
        """Let experts read texts up to some length, (text, expert, length), as far as allowed."""
        jobs: dict[int, list[Job]] = defaultdict(list)
        for text, expert, upto in due:
            if upto == 0:
                continue
            reading = self._reading_of(text, expert, upto)
            if reading.n_read >= upto:
                continue
            guesses = text.guesses if upto == len(text.tokens) else []
            job = self._within(Job(text, reading, upto, guesses), budget)
            if job is not None:
                jobs[expert].append(job)
        self.n_prefilled += self._passes.run(jobs)

    def _reading_of(self, text: Text, expert: int, upto: int) -> Reading:
        """What the expert has read; where others have read on, their pages are taken over."""
        old = text.readings.get(expert)
        if old is not None and upto - old.n_read < PAGE_TOKENS:
            return old
        new = begin_reading(expert, text, self.pool, upto)
        if old is not None and new.n_read <= old.n_read:
            self.pool.release(new.pages)
            return old
        if old is not None:
            self.pool.release(old.pages)
            self.n_reused -= old.n_read
        self.n_reused += new.n_read
        text.readings[expert] = new
        return new

    def _within(self, job: Job, budget: dict[int, int]) -> Job | None:
        """As much of a job as the budget of its expert allows; single tokens are always read."""
        expert, start = job.reading.expert, job.reading.n_read
        if job.upto == start + 1:
            return job
        left = budget.setdefault(expert, self.prefill_chunk or self._passes.prefill_chunk(expert))
        upto = min(job.upto, start + left)
        if upto == start:
            return None
        budget[expert] -= upto - start
        return job if upto == job.upto else Job(job.text, job.reading, upto)

    def _forget(self, text: Text, expert: int) -> None:
        self.pool.release(text.readings.pop(expert).pages)


def _index(rows: list[int] | list[list[int]], like: Tensor) -> Tensor:
    return to_device(torch.tensor(rows), like.device)
