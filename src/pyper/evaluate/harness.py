"""A mixture as a model of lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness).

What is asked of it is counted as its `HFLM` counts: texts begin with the document token, and what
is longer than the context loses its beginning.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from pyper.data import TextTokenizer
from pyper.errors import PromptError
from pyper.evaluate.harness_plan import Ask
from pyper.evaluate.harness_scores import rolling_windows, score
from pyper.generate import BatchEngine, EngineLimits, Request, SamplingConfig
from pyper.mixture import Mixture
from pyper.nn import PAGE_TOKENS

OnDone = Callable[[str, int, int], None]
"""Told what is asked, how many answers are there, and of how many."""

_MAX_NEW = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DEFAULT_NEW_TOKENS = 256


class MixtureLM(TemplateLM):  # type: ignore[misc]  # the library has no types
    """Answers the three kinds of requests of lm-evaluation-harness."""

    def __init__(
        self,
        mixture: Mixture,
        tokenizer: TextTokenizer,
        *,
        batch_tokens: int = 8192,
        on_done: OnDone | None = None,
    ) -> None:
        """batch_tokens: read at a time, over all texts of a batch."""
        super().__init__()
        self.mixture, self.text_tokenizer = mixture, tokenizer
        self.batch_tokens, self._on_done = batch_tokens, on_done
        self.n_requests = self.n_truncated = 0

    @property
    def eot_token_id(self) -> int:
        """The document token: before every text, and what ends it."""
        return self.text_tokenizer.bos_id

    @property
    def max_length(self) -> int:
        """The context, in tokens."""
        return self.mixture.settings.seq_len

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Token ids, behind the document token."""
        return [self.eot_token_id, *self.text_tokenizer.encode(string)]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """For each (context, continuation): its log-likelihood in nats, and whether it is what
        greedy decoding would write. Raises PromptError where it does not fit the context."""
        return self._loglikelihood_tokens([(r.args, *self._encode(*r.args)) for r in requests])

    def _encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not context:
            return [self.eot_token_id], self.text_tokenizer.encode(continuation)
        given, asked = self._encode_pair(context, continuation)
        # Nothing is left where its tokens went into those of the context.
        return given, asked or self.text_tokenizer.encode(continuation)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]]
    ) -> list[tuple[float, bool]]:
        asks = [self._ask(given, asked) for _, given, asked in requests]
        there = [ask for ask in asks if ask is not None]
        done = self._counter("log-likelihoods", len(there))
        found = iter(score(self.mixture, there, batch_tokens=self.batch_tokens, on_done=done))
        self.n_requests += len(asks)
        answers = [None if ask is None else next(found) for ask in asks]
        return [
            # Nothing is certain, and nothing is likelier.
            (0.0, True) if a is None else (float(a.log_probs.double().sum()), bool(a.is_greedy))
            for a in answers
        ]

    def _ask(self, given: list[int], asked: list[int]) -> Ask | None:
        """None where the continuation is empty."""
        if len(asked) > self.max_length:
            raise PromptError(
                f"a continuation of {len(asked):,} tokens does not fit the context of "
                f"{self.max_length:,}",
                hint="leave out the task, or ask for the whole text (`loglikelihood_rolling`)",
            )
        room = self.max_length + 1 - len(asked)
        self.n_truncated += len(given) > room
        return Ask(tuple(given[-room:]), tuple(asked)) if asked else None

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """The log-likelihood in nats of each whole text; a long one is read window by window."""
        context, texts = self.max_length, [self.text_tokenizer.encode(r.args[0]) for r in requests]
        windows = [rolling_windows(text, self.eot_token_id, context) for text in texts]
        asks = [ask for own in windows for ask in own]
        done = self._counter("windows of text", len(asks))
        found = iter(
            score(self.mixture, asks, batch_tokens=self.batch_tokens, greedy=False, on_done=done)
        )
        self.n_requests += len(windows)
        return [sum(float(next(found).log_probs.double().sum()) for _ in own) for own in windows]

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """What is written after each context, up to a stop string. Greedy, unless the task draws.

        Raises PromptError for a task that wants more new tokens than the context holds, or settings
        that are unknown.
        """
        wanted = [self._request(place, *r.args) for place, r in enumerate(requests)]
        engine = BatchEngine(self.mixture, self.text_tokenizer, self._limits(wanted))
        place_of = {engine.submit(request): place for place, request in enumerate(wanted)}
        texts: list[list[str]] = [[] for _ in wanted]
        done = self._counter("texts", len(wanted))
        while not engine.idle:
            for event in engine.step():
                texts[place_of[event.request_id]].append(event.text)
                if event.finished is not None:
                    done(1)
        self.n_requests += len(wanted)
        return ["".join(pieces) for pieces in texts]

    def _request(self, place: int, context: str, settings: Mapping[str, Any]) -> Request:
        sampling = sampling_of(settings, seed=place)
        room = self.max_length - sampling.max_new_tokens
        if room <= 0:
            raise PromptError(
                f"a task asks for {sampling.max_new_tokens:,} new tokens, and the context holds "
                f"{self.max_length:,}",
                hint="set `max_gen_toks` in the task's `generation_kwargs`",
            )
        tokens = self.tok_encode(context)
        self.n_truncated += len(tokens) > room
        return Request(tuple(tokens[-room:]), sampling)

    def _limits(self, requests: Sequence[Request]) -> EngineLimits:
        """As many at a time as `batch_tokens` hold."""
        longest = max((len(r.prompt) + r.sampling.max_new_tokens for r in requests), default=1)
        pages = -(-longest // PAGE_TOKENS)
        n_running = max(1, self.batch_tokens // (pages * PAGE_TOKENS))
        return EngineLimits(
            max_running=n_running,
            cache_tokens=n_running * self.mixture.n_experts * pages * PAGE_TOKENS,
        )

    def _counter(self, what: str, total: int) -> Callable[[int], None]:
        counter = _Counter(what, total, self._on_done)
        counter(0)
        return counter


@dataclass
class _Counter:
    what: str
    total: int
    on_done: OnDone | None
    done: int = 0

    def __call__(self, n: int) -> None:
        self.done += n
        if self.on_done is not None:
            self.on_done(self.what, self.done, self.total)


def sampling_of(settings: Mapping[str, Any], seed: int) -> SamplingConfig:
    """A task's `generation_kwargs`: `until`, `max_gen_toks` and its other names, `do_sample`,
    `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`. Raises PromptError for others.
    """
    left = dict(settings)
    until = left.pop("until", None) or []
    new_tokens = [left.pop(name, None) for name in _MAX_NEW]
    temperature = float(left.pop("temperature", None) or 0.0)
    draws = left.pop("do_sample", None)
    filters = {
        name: left.pop(name)
        for name in ("top_k", "top_p", "min_p", "repetition_penalty")
        if name in left
    }
    if unknown := [name for name, value in left.items() if value not in (None, False, 1)]:
        raise PromptError(
            f"a task sets `{unknown[0]}` in its `generation_kwargs`, which is not supported",
            hint="leave it out of the task",
        )
    return SamplingConfig(
        max_new_tokens=next((int(n) for n in new_tokens if n is not None), _DEFAULT_NEW_TOKENS),
        temperature=0.0 if draws is False else temperature,
        stop=tuple(s for s in ([until] if isinstance(until, str) else until) if s),
        seed=seed,
        **filters,
    )
