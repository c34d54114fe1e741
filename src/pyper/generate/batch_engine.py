"""Continuous batching over one mixture."""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from pyper.data import TextTokenizer
from pyper.errors import PromptError
from pyper.generate.decoding import MixtureDecoder
from pyper.generate.request import EngineLimits, EngineStats, Event, FinishReason, Request
from pyper.generate.sampling import next_token
from pyper.generate.text import TextStream
from pyper.mixture import Mixture


@dataclass
class _Running:
    request_id: int
    request: Request
    decoder: MixtureDecoder
    text: TextStream
    generator: torch.Generator
    limit: int


class BatchEngine:
    """Requests come and go; every step adds at most one token to each that runs.

    Not thread-safe: one thread owns it.
    """

    def __init__(self, mixture: Mixture, tokenizer: TextTokenizer, limits: EngineLimits) -> None:
        self.mixture, self.tokenizer, self.limits = mixture, tokenizer, limits
        self._waiting: deque[tuple[int, Request]] = deque()
        self._running: dict[int, _Running] = {}
        self._next_id = 0
        self._prefilled = self._decoded = 0

    def submit(self, request: Request) -> int:
        """Queue a request; its id. Raises PromptError for a prompt that cannot be served."""
        self._check(request)
        self._next_id += 1
        self._waiting.append((self._next_id, request))
        return self._next_id

    def cancel(self, request_id: int) -> None:
        """Forget a request before the next step; ids that are not known are ignored."""
        self._running.pop(request_id, None)
        self._waiting = deque(w for w in self._waiting if w[0] != request_id)

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        return not self._running and not self._waiting

    @torch.no_grad()
    def step(self) -> list[Event]:
        """One token for every running request; [] when idle."""
        while self._waiting and len(self._running) < self.limits.max_running:
            request_id, request = self._waiting.popleft()
            self._running[request_id] = self._start(request_id, request)
        events = [self._advance(running) for running in self._running.values()]
        for event in events:
            if event.finished is not None:
                del self._running[event.request_id]
        return events

    def stats(self) -> EngineStats:
        """Counters, and what is held now."""
        used = sum(int(r.decoder.lengths[0]) for r in self._running.values())
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            cache_tokens_used=used,
            cache_tokens_total=self.limits.cache_tokens,
            prefill_tokens=self._prefilled,
            decoded_tokens=self._decoded,
            reused_tokens=0,
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
        vocab_size = self.tokenizer.vocab_size
        for token in request.prompt:
            if not 0 <= token < vocab_size:
                raise PromptError(
                    f"token {token} is not one of the {vocab_size:,} of this model",
                    hint=f"use 0 … {vocab_size - 1}",
                )
        n_experts = self.mixture.n_experts
        if request.expert is not None and not 0 <= request.expert < n_experts:
            raise PromptError(
                f"there is no expert {request.expert}", hint=f"use 0 … {n_experts - 1}"
            )
        if not 0 <= request.n_logprobs <= vocab_size:
            raise PromptError(
                f"`n_logprobs` must be in 0 … {vocab_size:,}, not {request.n_logprobs}",
                hint="ask for fewer alternatives",
            )

    def _start(self, request_id: int, request: Request) -> _Running:
        mixture = self.mixture if request.expert is None else self._only(request.expert)
        prompt, sampling = list(request.prompt), request.sampling
        limit = min(len(prompt) + sampling.max_new_tokens, self.mixture.settings.seq_len)
        self._prefilled += len(prompt)
        return _Running(
            request_id,
            request,
            MixtureDecoder(mixture, [prompt], limit),
            TextStream(self.tokenizer, sampling.stop),
            torch.Generator().manual_seed(sampling.seed),
            limit,
        )

    def _only(self, expert: int) -> Mixture:
        settings = self.mixture.settings.model_copy(
            update={"experts": ("only",), "mixing": "posterior", "top_k": 1, "prices": ()}
        )
        return Mixture(settings, [lambda: self.mixture.expert(expert)], None)

    def _advance(self, running: _Running) -> Event:
        decoder, row = running.decoder, torch.tensor([0])
        log_probs, weights = decoder.next_log_probs(row)
        length = int(decoder.lengths[0])
        token = next_token(
            log_probs[0],
            decoder.tokens[0, :length],
            running.request.sampling,
            running.generator,
        )
        finished, shown = self._show(running, token, at_limit=length + 1 >= running.limit)
        if finished is None:
            decoder.append(row, torch.tensor([token]))
        self._decoded += 1
        return _event(running.request_id, running.request, token, shown, finished, log_probs[0],
                      self._all_weights(running.request, weights[0]))  # fmt: skip

    def _show(
        self, running: _Running, token: int, *, at_limit: bool
    ) -> tuple[FinishReason | None, str]:
        finished: FinishReason | None = None
        shown = ""
        if token == self.tokenizer.bos_id:
            finished = "stop"
        else:
            shown = running.text.push(token)
            if running.text.stopped:
                finished = "stop"
            elif at_limit:
                finished = "length"
        if finished is not None:
            shown += running.text.finish()
        return finished, shown

    def _all_weights(self, request: Request, weights: Tensor) -> Tensor:
        if request.expert is None:
            return weights
        return torch.nn.functional.one_hot(
            torch.tensor(request.expert), self.mixture.n_experts
        ).float()


def _event(
    request_id: int,
    request: Request,
    token: int,
    text: str,
    finished: FinishReason | None,
    log_probs: Tensor,
    weights: Tensor,
) -> Event:
    best = log_probs.topk(request.n_logprobs)
    alternatives = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return Event(
        request_id=request_id,
        token=token,
        text=text,
        log_prob=float(log_probs[token]),
        alternatives=tuple(alternatives),
        expert=int(weights.argmax()),
        weights=tuple(weights.tolist()),
        finished=finished,
    )
