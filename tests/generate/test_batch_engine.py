"""Requests come and go, wait for room, are cancelled; none of it shows in what another gets."""

import random
from typing import Any

import pytest
import torch

from generate.test_writing_text import BYTES, scripted, small_bytes
from pyper.errors import PromptError
from pyper.generate import BatchEngine, EngineLimits, Event, Request, SamplingConfig, complete
from pyper.mixture import Mixture
from pyper.nn import PAGE_TOKENS

GREEDY = SamplingConfig(max_new_tokens=6, temperature=0.0)


def ask(text: str, sampling: SamplingConfig = GREEDY, **more: Any) -> Request:
    return Request((BYTES.bos_id, *BYTES.encode(text)), sampling, **more)


def engine_of(mixture: Mixture, **limits: int) -> BatchEngine:
    return BatchEngine(mixture, BYTES, EngineLimits(**{"cache_tokens": 8192} | limits))


def run(engine: BatchEngine) -> dict[int, list[Event]]:
    events: dict[int, list[Event]] = {}
    while not engine.idle:
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
    return events


def alone(mixture: Mixture, request: Request) -> list[Event]:
    engine = engine_of(mixture)
    number = engine.submit(request)
    return run(engine)[number]


def contents(events: list[Event]) -> list[tuple[object, ...]]:
    """All but the number of the request."""
    return [
        (e.token, e.text, e.log_prob, e.alternatives, e.expert, e.weights, e.finished)
        for e in events
    ]


@pytest.mark.parametrize("mixing", ["posterior", "top1", "window"])
def test_requests_that_come_at_any_time_get_what_they_get_alone(mixing: str) -> None:
    mixture, rng = small_bytes(mixing=mixing, prune=0.01), random.Random(0)
    engine = engine_of(mixture, max_running=4, prefill_chunk=9)
    asked: dict[int, Request] = {}
    got: dict[int, list[Event]] = {}
    while len(asked) < 14 or not engine.idle:
        if len(asked) < 14 and rng.random() < 0.5:
            sampling = SamplingConfig(
                max_new_tokens=rng.randrange(1, 12),
                temperature=rng.choice([0.0, 0.7, 1.3]),
                top_k=rng.choice([None, 5]),
                top_p=rng.choice([1.0, 0.8]),
                repetition_penalty=rng.choice([1.0, 1.4]),
                stop=rng.choice([(), ("e", "\x00")]),
                seed=rng.randrange(5),
            )
            text = "".join(rng.choice("abc ") for _ in range(rng.randrange(0, 30)))
            pinned, n = rng.choice([None, None, 2]), rng.choice([0, 3])
            request = ask(text, sampling, expert=pinned, n_logprobs=n)
            asked[engine.submit(request)] = request
        events = engine.step()
        assert len({e.request_id for e in events}) == len(events) <= 4
        for event in events:
            got.setdefault(event.request_id, []).append(event)
    for number, request in asked.items():
        assert contents(got[number]) == contents(alone(mixture, request))
    assert engine.stats().cache_tokens_used == 0


def test_what_is_reported_of_a_token_is_what_the_mixture_says() -> None:
    mixture = small_bytes(top_k=3)
    sampling = SamplingConfig(max_new_tokens=5, temperature=1.2, top_k=20, seed=4)
    tokens = list(ask("say").prompt)
    for event in alone(mixture, ask("say", sampling, n_logprobs=4)):
        log_probs = mixture.log_probs(torch.tensor([tokens]))[0, -1]
        weights = mixture.log_weights(torch.tensor([tokens]))[0, -1].exp()
        assert event.log_prob == pytest.approx(float(log_probs[event.token]), abs=1e-4)
        best = log_probs.topk(4)
        assert [token for token, _ in event.alternatives] == best.indices.tolist()
        assert [v for _, v in event.alternatives] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert list(event.weights) == pytest.approx(weights.tolist(), abs=1e-4)
        assert event.expert == int(weights.argmax())
        tokens.append(event.token)


@pytest.mark.parametrize("mixing", ["posterior", "top1", "window"])
def test_a_pinned_expert_writes_alone(mixing: str) -> None:
    mixture = small_bytes(mixing=mixing)
    only = Mixture(
        mixture.settings.model_copy(update={"experts": ("c",), "mixing": "posterior", "top_k": 1}),
        [lambda: mixture.expert(2)],
        None,
    )
    expected = complete(only, BYTES, ["hello"], GREEDY)[0]
    got = alone(mixture, ask("hello", expert=2))
    assert "".join(e.text for e in got) == expected.text
    assert {(e.expert, e.weights) for e in got} == {(2, (0.0, 0.0, 1.0, 0.0))}


def test_a_cancelled_request_leaves_at_once_and_the_others_go_on() -> None:
    mixture = scripted("abcdefghijklmnopqrstuvwxyz", seq_len=64)
    engine = engine_of(mixture, max_running=2)
    first, second, third = (engine.submit(ask(c)) for c in "abc")
    engine.step()
    engine.cancel(first)
    engine.cancel(first)
    engine.cancel(99)
    assert engine.stats().running == 1
    events = run(engine)
    assert first not in events
    assert "".join(e.text for e in events[third]) == "defghi"
    assert len(events[second]) == 5  # one token was written before
    assert engine.stats().cache_tokens_used == 0


def test_a_request_that_waits_can_be_cancelled() -> None:
    engine = engine_of(scripted("abcdef"), max_running=1)
    first, second = engine.submit(ask("a")), engine.submit(ask("b"))
    engine.step()
    assert engine.stats().waiting == 1
    engine.cancel(second)
    assert engine.stats().waiting == 0
    assert run(engine).keys() == {first}
    assert engine.step() == []


def test_a_finished_row_makes_room_at_once_first_come_first_served() -> None:
    mixture = scripted("abcdefghijklmnopqrstuvwxyz", seq_len=64)
    engine = engine_of(mixture, max_running=2)
    lengths = [1, 5, 2, 3]
    numbers = [engine.submit(ask("a", SamplingConfig(n, 0.0))) for n in lengths]
    running = []
    while not engine.idle:
        running.append([numbers.index(e.request_id) for e in engine.step()])
    assert running == [[0, 1], [1, 2], [1, 2], [1, 3], [1, 3], [3]]


def test_requests_wait_until_there_are_pages_for_all_that_they_may_write() -> None:
    mixture = scripted("abcdefghijklmnopqrstuvwxyz", seq_len=64)
    engine = engine_of(mixture, cache_tokens=4 * PAGE_TOKENS)
    large, small = SamplingConfig(3 * PAGE_TOKENS - 2, 0.0), SamplingConfig(2, 0.0)
    numbers = [engine.submit(ask("a", s)) for s in (large, large, small)]
    engine.step()
    assert (engine.stats().running, engine.stats().waiting) == (1, 2)  # nobody overtakes
    events = run(engine)
    assert events.keys() == set(numbers)
    assert {e[-1].finished for e in events.values()} <= {"stop", "length"}


def test_more_than_the_whole_cache_is_refused() -> None:
    engine = engine_of(small_bytes(), cache_tokens=4 * PAGE_TOKENS)
    with pytest.raises(PromptError, match=r"room for 128 tokens .* holds 64") as caught:
        engine.submit(ask("a" * 20))
    assert "larger cache" in caught.value.hint


def test_a_long_prompt_does_not_hold_up_the_others() -> None:
    mixture = scripted("abcdefghijklmnopqrstuvwxyz", seq_len=200)
    engine = engine_of(mixture, prefill_chunk=20)
    short = engine.submit(ask("a", SamplingConfig(12, 0.0)))
    engine.step()
    long = engine.submit(ask("x" * 99))
    steps = [[e.request_id for e in engine.step()] for _ in range(6)]
    assert steps == [[short]] * 4 + [[short, long]] * 2
    assert engine.stats().prefill_tokens >= 100


def test_a_prompt_that_was_read_before_is_not_read_again() -> None:
    mixture = scripted("abcdefghijklmnopqrstuvwxyz", seq_len=200)
    engine = engine_of(mixture)
    engine.submit(ask("y" * 64))
    first = run(engine)
    engine.submit(ask("y" * 64 + "abc"))
    second = run(engine)
    assert engine.stats().reused_tokens == 64
    assert ["".join(e.text for e in es) for es in (*first.values(), *second.values())] == [
        "z",
        "defghi",
    ]


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request((), GREEDY), "empty"),
        (ask("x" * 48), "the prompt has 49 tokens and the context holds 48"),
        (Request((0, 257), GREEDY), "a token must be in 0 … 256, not 257"),
        (Request((0, -1), GREEDY), "a token must be in 0 … 256, not -1"),
        (ask("a", expert=4), "`expert` must be in 0 … 3, not 4"),
        (ask("a", expert=-1), "`expert` must be in 0 … 3, not -1"),
        (ask("a", n_logprobs=-1), "`n_logprobs` must be in 0 … 257, not -1"),
        (ask("a", n_logprobs=258), "`n_logprobs` must be in 0 … 257, not 258"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(request_: Request, says: str) -> None:
    engine = engine_of(small_bytes())
    with pytest.raises(PromptError, match=says) as caught:
        engine.submit(request_)
    assert caught.value.hint
    assert engine.idle


@pytest.mark.parametrize("mixing", ["posterior", "top1", "window"])
def test_a_small_cache_serves_any_mix_of_requests(mixing: str) -> None:
    """Pages are reserved for the worst case, so that they never run out half-way."""
    mixture, rng = small_bytes(mixing=mixing, router="experts", prune=0.05), random.Random(3)
    engine = engine_of(mixture, cache_tokens=24 * PAGE_TOKENS, prefill_chunk=16)
    numbers = set()
    for _ in range(30):
        text = rng.choice(["x" * 30, "y" * 20, "xy"]) + "z" * rng.randrange(3)
        sampling = SamplingConfig(rng.randrange(1, 20), 1.0, seed=rng.randrange(9))
        numbers.add(engine.submit(ask(text, sampling, expert=rng.choice([None, 1]))))
    events: dict[int, list[Event]] = {}
    while not engine.idle:
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
        assert engine.stats().cache_tokens_used <= 24 * PAGE_TOKENS
        if rng.random() < 0.05 and numbers - events.keys():
            gone = rng.choice(sorted(numbers - events.keys()))
            engine.cancel(gone)
            numbers.remove(gone)
    assert events.keys() == numbers
    assert all(e[-1].finished for e in events.values())
