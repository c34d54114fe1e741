"""Continuous batching over one mixture."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyper.data import TextTokenizer
from pyper.errors import PromptError
from pyper.generate.mixture_reader import MixtureReader, Predictions
from pyper.generate.reading import Text
from pyper.generate.request import EngineLimits, EngineStats, Event, FinishReason, Request
from pyper.generate.sampling import SamplingBatch, draw
from pyper.generate.text import TextStream
from pyper.mixture import Mixture
from pyper.nn import PAGE_TOKENS

Alternatives = tuple[tuple[int, float], ...]


@dataclass
class _Running:
    """A request that has been admitted."""

    request_id: int
    request: Request
    text: Text
    shown: TextStream
    chance: torch.Generator
    """On the CPU, so that a seed gives the same text on every device."""
    n_pages: int
    """Reserved for it: the most that it may still come to use."""


class BatchEngine:
    """Requests come and go; every step adds at most one token to each that runs.

    What a request gets depends on its prompt, its sampling and its seed, not on the others. Not
    thread-safe: one thread owns it.
    """

    def __init__(
        self,
        mixture: Mixture,
        tokenizer: TextTokenizer,
        limits: EngineLimits,
        *,
        compiled: bool = False,
        fixed_shapes: bool | None = None,
    ) -> None:
        """compiled, fixed_shapes: see `MixtureReader`."""
        self.mixture, self.tokenizer, self.limits = mixture, tokenizer, limits
        self._reader = MixtureReader(
            mixture,
            cache_tokens=limits.cache_tokens,
            prefill_chunk=limits.prefill_chunk,
            compiled=compiled,
            fixed_shapes=fixed_shapes,
        )
        self._waiting: deque[tuple[int, Request]] = deque()
        self._running: dict[int, _Running] = {}
        self._last_id = 0
        self._n_decoded = 0

    def submit(self, request: Request) -> int:
        """Queue a request; its id. Raises PromptError for one that cannot be served."""
        self._check(request)
        self._last_id += 1
        self._waiting.append((self._last_id, request))
        return self._last_id

    def cancel(self, request_id: int) -> None:
        """Forget a request before the next step; ids that are not known are ignored."""
        self._waiting = deque(w for w in self._waiting if w[0] != request_id)
        if request_id in self._running:
            self._leave(self._running[request_id])

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        return not self._running and not self._waiting

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Admit, read, and write one token for every request that has been read; [] when idle."""
        self._admit()
        by_text = {id(r.text): r for r in self._running.values()}
        ready = self._reader.advance([r.text for r in self._running.values()])
        events: dict[int, Event] = {}
        for predictions in self._reader.predict(ready):
            running = [by_text[id(text)] for text in predictions.texts]
            events |= self._write(running, predictions)
        for request_id in [i for i, event in events.items() if event.finished]:
            self._leave(self._running[request_id])
        for running_one in self._running.values():
            running_one.n_pages = self._reader.pages_left_for(running_one.text)
        return [events[i] for i in sorted(events)]

    def stats(self) -> EngineStats:
        """Counters, and what is held now."""
        reader = self._reader
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            cache_tokens_used=reader.pool.n_used * PAGE_TOKENS,
            cache_tokens_total=reader.pool.n_pages * PAGE_TOKENS,
            prefill_tokens=reader.n_prefilled,
            decoded_tokens=self._n_decoded,
            reused_tokens=reader.n_reused,
            resident_experts=self.mixture.n_loaded,
        )

    def _check(self, request: Request) -> None:
        context, n = self.mixture.settings.seq_len, len(request.prompt)
        if n == 0:
            raise PromptError("the prompt is empty", hint="begin it with the document token")
        if n >= context:
            raise PromptError(
                f"the prompt has {n:,} tokens and the context holds {context:,}",
                hint=f"shorten it to at most {context - 1:,} tokens",
            )
        n_vocab, n_experts = self.tokenizer.vocab_size, self.mixture.n_experts
        for name, value, limit in [
            *(("a token", token, n_vocab - 1) for token in request.prompt),
            ("`expert`", request.expert or 0, n_experts - 1),
            ("`n_logprobs`", request.n_logprobs, n_vocab),
        ]:
            if not 0 <= value <= limit:
                raise PromptError(
                    f"{name} must be in 0 … {limit:,}, not {value}", hint="choose one of them"
                )
        needed, there = self._pages_for(request), self._reader.pool.n_pages
        if needed > there:
            raise PromptError(
                f"the request needs room for {needed * PAGE_TOKENS:,} tokens (over all experts), "
                f"the cache holds {there * PAGE_TOKENS:,}",
                hint="ask for fewer new tokens, or give the engine a larger cache",
            )

    def _pages_for(self, request: Request) -> int:
        n, capacity = len(request.prompt), self._capacity(request)
        return self._reader.pages_for(n, capacity, request.expert)

    def _capacity(self, request: Request) -> int:
        n = len(request.prompt) + request.sampling.max_new_tokens
        return min(n, self.mixture.settings.seq_len)

    def _admit(self) -> None:
        """First come, first served: who does not fit yet holds up those behind."""
        left = self._reader.pool.n_pages - sum(r.n_pages for r in self._running.values())
        while self._waiting and len(self._running) < self.limits.max_running:
            request_id, request = self._waiting[0]
            needed = self._pages_for(request)
            if needed > left:
                return
            left -= needed
            self._waiting.popleft()
            text = self._reader.open(request.prompt, self._capacity(request), request.expert)
            self._running[request_id] = _Running(
                request_id,
                request,
                text,
                TextStream(self.tokenizer, request.sampling.stop),
                torch.Generator().manual_seed(request.sampling.seed),
                needed,
            )

    def _leave(self, running: _Running) -> None:
        self._reader.close(running.text)
        del self._running[running.request_id]

    def _write(self, rows: Sequence[_Running], predictions: Predictions) -> dict[int, Event]:
        """Draw a token for each row; what came of it, by request."""
        log_probs, device = predictions.log_probs, predictions.log_probs.device
        batch = SamplingBatch.of([r.request.sampling for r in rows], device)
        uniforms = torch.cat([torch.rand(1, generator=r.chance) for r in rows]).to(device)
        seen = None if batch.repetition_penalty is None else _seen(rows, log_probs)
        drawn = draw(log_probs, batch, uniforms, seen)[:, None]
        # One small copy is all that a GPU is waited for.
        said = torch.cat([log_probs[:, None], predictions.per_expert], dim=1)
        scores = said.gather(-1, drawn[..., None].expand(-1, said.shape[1], 1)).squeeze(-1)
        packed = torch.cat([drawn.double(), scores.double()], dim=-1)
        alternatives = _alternatives(rows, log_probs)
        events = {}
        for row, experts, values, others in zip(
            rows, predictions.experts, packed.tolist(), alternatives, strict=True
        ):
            token, log_prob, *scores = values
            events[row.request_id] = self._add(row, int(token), log_prob, others)
            if events[row.request_id].finished is None:
                self._reader.append(row.text, int(token), experts, scores)
        self._n_decoded += len(rows)
        return events

    def _add(
        self,
        row: _Running,
        token: int,
        log_prob: float,
        alternatives: tuple[tuple[int, float], ...],
    ) -> Event:
        """What one more token shows, and whether it ends the text: a new document, a stop string,
        the limit."""
        finished: FinishReason | None = None
        shown = ""
        if token == self.tokenizer.bos_id:
            finished = "stop"
        else:
            shown = row.shown.push(token)
            if row.shown.stopped:
                finished = "stop"
            elif len(row.text.tokens) + 1 >= row.text.capacity:
                finished = "length"
        if finished is not None:
            shown += row.shown.finish()
        weights = row.text.weights
        assert weights is not None
        return Event(
            row.request_id,
            token,
            shown,
            log_prob,
            alternatives,
            weights.index(max(weights)),
            weights,
            finished,
        )


def _seen(rows: Sequence[_Running], log_probs: Tensor) -> Tensor:
    """(R, V), True for tokens that a row has already."""
    seen = torch.zeros(log_probs.shape, dtype=torch.bool)
    for index, row in enumerate(rows):
        seen[index, torch.tensor(row.text.tokens)] = True
    return seen.to(log_probs.device)


def _alternatives(rows: Sequence[_Running], log_probs: Tensor) -> list[Alternatives]:
    """The likeliest tokens of each row with their log-probabilities, as many as it asked for."""
    wanted = [r.request.n_logprobs for r in rows]
    if not any(wanted):
        return [()] * len(rows)
    best = log_probs.topk(max(wanted), dim=-1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        tuple(zip(tokens[:n], values[:n], strict=True))
        for n, (tokens, values) in zip(wanted, pairs, strict=True)
    ]
