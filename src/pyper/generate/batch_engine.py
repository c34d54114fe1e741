"""Continuous batching over one mixture."""

from collections import deque

import torch

from pyper.data import TextTokenizer
from pyper.errors import PromptError
from pyper.generate.draws import Draw, Ends, draw_tokens
from pyper.generate.mixture_reader import MixtureReader
from pyper.generate.predictions import Predictions
from pyper.generate.request import EngineLimits, EngineStats, Event, Request
from pyper.generate.running import Running, chances
from pyper.generate.speculation import Drafter, Payoff
from pyper.generate.text import TextStream
from pyper.mixture import Mixture
from pyper.nn import PAGE_TOKENS


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
        fixed_shapes: bool | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        """fixed_shapes: see `MixtureReader`. drafter: guesses tokens, while that pays."""
        self.mixture, self.tokenizer, self.limits = mixture, tokenizer, limits
        self._reader = MixtureReader(
            mixture,
            cache_tokens=limits.cache_tokens,
            prefill_chunk=limits.prefill_chunk,
            compiled=limits.compiled,
            fixed_shapes=fixed_shapes,
            drafter=drafter,
        )
        self._stop_ids = frozenset((tokenizer.bos_id, *mixture.settings.stop_ids))
        self._payoff = Payoff()
        self._waiting: deque[tuple[int, Request]] = deque()
        self._running: dict[int, Running] = {}
        self._ahead: list[Draw] = []
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
        """Admit, read, and write one token for every request that has been read; [] when idle.

        On a GPU the next tokens are already under way when this returns, as long as nobody comes
        and it is known which experts read them: the GPU does not wait for the host.
        """
        self._payoff.begin()
        self._reader.may_guess = self._payoff.is_on
        before = self._reader.n_prefilled
        draws = self._ahead or self._read_and_draw()
        self._ahead = self._run_ahead(draws)
        events = [event for draw in draws for event in self._land(draw)]
        if not self._running:
            self._ahead = []
        self._payoff.end(len(events), counts=self._reader.n_prefilled == before)
        return sorted(events, key=lambda event: event.request_id)

    def _read_and_draw(self) -> list[Draw]:
        self._admit()
        by_text = {id(r.text): r for r in self._running.values()}
        ready = self._reader.advance([r.text for r in self._running.values()])
        return [
            self._draw([by_text[id(text)] for text in said.texts], said)
            for said in self._reader.predict(ready)
        ]

    def _draw(self, rows: list[Running], said: Predictions, last: Ends | None = None) -> Draw:
        return draw_tokens(rows, said, self.tokenizer.vocab_size, last)

    def _run_ahead(self, draws: list[Draw]) -> list[Draw]:
        """Read the tokens that are being drawn, and draw again, before the host has seen them.

        Only if it is known which experts read them, and nobody waits to come in.
        """
        if len(draws) != 1 or self._can_admit():
            return []
        ends = draws[0].ends
        here = [i for i, row in enumerate(ends.rows) if self._is_running(row)]
        going = [i for i in here if not ends.rows[i].is_last]
        if len(here) < len(self._running) or not going:
            return []
        last = ends.of(going)
        texts = [row.text for row in last.rows]
        said = self._reader.read_ahead(texts, last.tokens, last.experts, last.scores)
        return [] if said is None else [self._draw(last.rows, said, last)]

    def _is_running(self, row: Running) -> bool:
        return self._running.get(row.request_id) is row

    def _land(self, draw: Draw) -> list[Event]:
        """What the tokens of a draw show. Who is finished leaves; who has left is passed over."""
        events = []
        ends = draw.ends
        for row, experts, drawn in zip(ends.rows, ends.experts, draw.outcomes(), strict=True):
            if not self._is_running(row):
                continue
            event = row.add(drawn.token, drawn.log_prob, drawn.alternatives, self._stop_ids)
            events.append(event)
            if event.finished is None:
                self._reader.append(row.text, drawn.token, experts, drawn.scores)
            else:
                self._leave(row)
        self._n_decoded += len(events)
        return events

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
            guessed_tokens=reader.n_guessed,
            accepted_tokens=reader.n_accepted,
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

    def _can_admit(self) -> bool:
        """First come, first served: who does not fit yet holds up those behind."""
        if not self._waiting or len(self._running) >= self.limits.max_running:
            return False
        reserved = sum(self._reader.pages_left_for(row.text) for row in self._running.values())
        return self._pages_for(self._waiting[0][1]) <= self._reader.pool.n_pages - reserved

    def _admit(self) -> None:
        while self._can_admit():
            request_id, request = self._waiting.popleft()
            self._running[request_id] = Running(
                request_id,
                request,
                self._reader.open(request.prompt, self._capacity(request), request.expert),
                TextStream(self.tokenizer, request.sampling.stop),
                chances(request.sampling.seed),
            )

    def _leave(self, running: Running) -> None:
        self._reader.close(running.text)
        del self._running[running.request_id]
