"""Guesses change how fast a text is written, never what is written."""

import random
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from scipy import stats

from generate.test_batch_engine import ask, contents, run
from generate.test_writing_text import BYTES, scripted, small_bytes
from mixture.small_mixtures import MODES, loaders_of, small_settings
from nn.small_experts import BOS, small_expert
from pyper.generate import (
    BatchEngine,
    Drafter,
    EngineLimits,
    ModelDrafter,
    RepetitionDrafter,
    Request,
    RouterDrafter,
    SamplingConfig,
)
from pyper.generate.mixing_state import MixingState
from pyper.generate.reading import Text
from pyper.generate.speculation import Payoff
from pyper.mixture import Mixture


class Guesser:
    """Guesses what it is told."""

    def __init__(self, guess: Callable[[list[int], int], list[int]]) -> None:
        self._guess = guess

    def guess(self, text: Text, n: int) -> list[int]:
        return self._guess(text.tokens, n)


def anything(tokens: list[int], n: int) -> list[int]:
    """Often right by chance in a small vocabulary, often wrong; of any number."""
    rng = random.Random(hash(tuple(tokens)))
    return [rng.randrange(257) for _ in range(rng.randrange(n + 1))]


class AlwaysOn(Payoff):
    """Guessing, whatever it costs."""

    def end(self, n_tokens: int, *, counts: bool) -> None:
        pass


def engine_of(mixture: Mixture, drafter: Drafter | None) -> BatchEngine:
    engine = BatchEngine(mixture, BYTES, EngineLimits(cache_tokens=16_384), drafter=drafter)
    engine._payoff = AlwaysOn()
    return engine


def written(mixture: Mixture, drafter: Drafter | None) -> tuple[list[Any], BatchEngine]:
    engine, rng = engine_of(mixture, drafter), random.Random(0)
    numbers = []
    for number in range(12):
        temperature = rng.choice([0.0, 0.0, 1.0])
        sampling = SamplingConfig(20, temperature, stop=("q",), seed=number, repetition_penalty=1.1)
        text = "abc" * rng.randrange(6)
        numbers.append(engine.submit(ask(text, sampling, expert=rng.choice([None, 1]))))
    events = run(engine)
    assert engine.stats().cache_tokens_used == 0
    return [contents(events[number]) for number in numbers], engine


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["repetition", "model", "router", "anything"])
def test_the_text_is_the_same_to_the_last_bit(mode: dict[str, Any], kind: str) -> None:
    """Greedy or sampled, with its log-probabilities, weights and alternatives."""
    mixture = small_bytes(prune=0.01, **mode)
    drafter: Drafter = {
        "repetition": RepetitionDrafter(shortest=1),
        "model": ModelDrafter(mixture.expert(1)),
        "router": RouterDrafter([mixture.expert(e) for e in range(4)]),
        "anything": Guesser(anything),
    }[kind]
    expected, _ = written(mixture, None)
    got, engine = written(mixture, drafter)
    assert got == expected
    assert engine.stats().guessed_tokens > 0
    if kind in ("model", "router"):
        assert engine.stats().accepted_tokens > 0


class Alternating(Payoff):
    """Guessing is switched on and off in the middle of texts."""

    n_steps = 0

    def end(self, n_tokens: int, *, counts: bool) -> None:
        self.n_steps += 1
        self.is_on = self.n_steps % 5 < 3


@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.parametrize("mode", [MODES[1], *MODES[3:]])
def test_switching_it_on_and_off_shows_in_the_time_alone(
    mode: dict[str, Any], fixed_shapes: bool
) -> None:
    mixture = small_bytes(**mode)

    def tokens(drafter: Drafter | None) -> list[list[int | None]]:
        limits = EngineLimits(cache_tokens=16_384)
        engine = BatchEngine(mixture, BYTES, limits, fixed_shapes=fixed_shapes, drafter=drafter)
        engine._payoff = Alternating()
        for number in range(6):
            sampling = SamplingConfig(20, number % 2, seed=number)
            engine.submit(ask("ab" * number, sampling, expert=[None, 2][number % 3 == 0]))
        return [[e.token for e in events] for _, events in sorted(run(engine).items())]

    assert tokens(ModelDrafter(mixture.expert(1))) == tokens(None)


def alphabet(tokens: list[int], n: int) -> list[int]:
    return [tokens[-1] + i for i in range(1, n + 1)]


@pytest.mark.parametrize(("guess", "n_passes"), [(alphabet, 3), (lambda tokens, n: [3] * n, 19)])
def test_right_guesses_save_passes(guess: Callable[..., list[int]], n_passes: int) -> None:
    mixture = scripted("abcdefghijklmnopqrstuvwxyz", seq_len=64)
    drafter, n_read = Guesser(guess), 0

    def count(*_: object) -> None:
        nonlocal n_read
        n_read += 1

    mixture.expert(0).embedding.register_forward_hook(count)
    engine = engine_of(mixture, drafter)
    number = engine.submit(ask("a", SamplingConfig(20, 0.0)))
    engine.step()  # the prompt
    n_read = 0
    events = run(engine)[number]
    assert "".join(event.text for event in events) == "cdefghijklmnopqrstu"
    assert n_read == n_passes


class Numbers:
    """A tokenizer without text."""

    bos_id, vocab_size = BOS, 5

    def decode_bytes(self, tokens: list[int]) -> bytes:
        return b"".join(b"%d" % token for token in tokens)


@pytest.mark.parametrize("kind", ["model", "anything"])
@torch.no_grad()
def test_what_is_sampled_keeps_its_distribution(kind: str) -> None:
    """All texts of three tokens of five kinds, against their exact probabilities."""
    model = small_expert(0, std=0.25, vocab_size=5)
    settings = small_settings(experts=("only",), router="experts")
    mixture = Mixture(settings, loaders_of([model]), None)
    drafter: Drafter = ModelDrafter(small_expert(1, std=0.25, vocab_size=5))
    if kind == "anything":
        drafter = Guesser(lambda tokens, n: [(len(tokens) + sum(tokens)) % 5] * n)
    limits = EngineLimits(max_running=100, cache_tokens=100 * 32)
    engine = BatchEngine(mixture, Numbers(), limits, drafter=drafter)
    engine._payoff = AlwaysOn()
    n = 3000
    for seed in range(n):
        engine.submit(Request((BOS,), SamplingConfig(3, 1.0, seed=seed)))
    counts: dict[tuple[int, ...], int] = {}
    for events in run(engine).values():
        text = tuple(event.token for event in events)
        counts[text] = counts.get(text, 0) + 1
    expected = {}
    for text in product(range(5), repeat=3):
        end = text.index(BOS) + 1 if BOS in text else 3
        log_probs = model(torch.tensor([[BOS, *text]])).log_softmax(-1)[0]
        expected[text[:end]] = n * float(log_probs[range(end), text[:end]].sum().exp())
    common = [text for text, count in expected.items() if count >= 5]
    got = [counts.pop(text, 0) for text in common]
    of_these = [expected[text] for text in common]
    rare = n - sum(of_these)
    test = stats.chisquare([*got, sum(counts.values())], [*of_these, rare])
    assert test.pvalue > 0.01
    assert 0 < engine.stats().accepted_tokens < engine.stats().guessed_tokens


def test_repetition_finds_the_latest_and_longest_occurrence() -> None:
    def guess(*tokens: int, n: int = 3) -> list[int]:
        return RepetitionDrafter(3, 2).guess(Text(list(tokens), 99, None), n)  # type: ignore[arg-type]

    assert guess(1, 2, 3, 4, 1, 2, 5, 6, 1, 2) == [5, 6, 1]
    assert guess(9, 1, 2, 7, 8, 1, 2, 5, 9, 1, 2) == [7, 8, 1]
    assert guess(1, 2, 1, 2) == [1, 2]
    assert guess(1, 2, 3, 2) == []
    assert guess(5) == []


def test_a_drafting_model_reads_no_token_twice() -> None:
    model, n_read = small_expert(vocab_size=257), 0

    def count(_: object, inputs: tuple[torch.Tensor]) -> None:
        nonlocal n_read
        n_read += inputs[0].numel()

    model.embedding.register_forward_pre_hook(count)
    drafter = ModelDrafter(model)
    text = Text([0, 1, 2, 3], 40, None)  # type: ignore[arg-type]
    first = drafter.guess(text, 4)
    assert (n_read, len(first)) == (4 + 3, 4)
    text.tokens += [*first[:2], first[2] + 1]  # two are right, the third is not
    assert drafter.guess(text, 2) != first
    assert n_read == 7 + 1 + 1
    fresh = Text(list(text.tokens), 40, None)  # type: ignore[arg-type]
    assert drafter.guess(fresh, 2) == ModelDrafter(model).guess(text, 2)


def test_a_drafting_model_guesses_nothing_beyond_its_own_context() -> None:
    drafter = ModelDrafter(small_expert(vocab_size=257, seq_len=8))
    text = Text([0, 1, 2, 3, 4, 5], 40, None)  # type: ignore[arg-type]
    assert len(drafter.guess(text, 7)) == 3  # the last of them is never read
    text.tokens += [6, 7]
    assert len(drafter.guess(text, 7)) == 1
    for token in range(3):
        text.tokens.append(token)
        assert drafter.guess(text, 7) == []


def test_texts_longer_than_the_context_of_the_drafting_model_go_on() -> None:
    mixture = small_bytes()
    drafter = ModelDrafter(small_expert(vocab_size=257, seq_len=16))
    assert written(mixture, drafter)[0] == written(mixture, None)[0]


def test_rows_that_pad_the_table_of_a_drafting_model_are_not_guessed() -> None:
    model = small_expert(vocab_size=300)
    with torch.no_grad():
        model.head.weight[257:] *= 100
    text = Text([0, 1, 2, 3], 40, None)  # type: ignore[arg-type]
    assert max(ModelDrafter(model).guess(text, 7)) >= 257
    assert max(ModelDrafter(model, n_tokens=257).guess(text, 7)) < 257


@pytest.mark.parametrize("leader", range(4))
def test_the_router_model_of_the_expert_that_leads_guesses(leader: int) -> None:
    mixture = small_bytes()
    models = [mixture.expert(e) for e in range(4)]
    tokens = [BOS, 1, 2, 3]
    state = MixingState(mixture, 40, None)
    text = Text(tokens, 40, state, weights=tuple(0.1 + 0.6 * (e == leader) for e in range(4)))
    pinned = Text(tokens, 40, MixingState(mixture, 40, leader))  # not weighed yet
    expected = ModelDrafter(models[leader]).guess(text, 5)
    assert RouterDrafter(models).guess(text, 5) == expected
    assert RouterDrafter(models).guess(pinned, 5) == expected
    others = [ModelDrafter(models[e]).guess(text, 5) for e in range(4) if e != leader]
    assert expected not in others


class Clock:
    """Time that passes as it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("with_guesses", "pays"), [(0.5, True), (2.0, False)])
def test_guessing_stops_where_it_does_not_pay_and_is_tried_again(
    with_guesses: float, pays: bool
) -> None:
    clock = Clock()
    payoff, was_on = Payoff(clock), []
    for _ in range(4000):
        payoff.begin()
        clock.now += with_guesses if payoff.is_on else 1.0
        was_on.append(payoff.is_on)
        payoff.end(1, counts=True)
    assert set(was_on[:40]) == {True, False}  # both were tried
    share = sum(was_on) / len(was_on)
    assert share > 0.9 if pays else share < 0.1
    assert set(was_on[1000:2000]) == {True, False}  # and again later
    with_guesses = 1 / with_guesses  # things change
    for _ in range(2000):
        payoff.begin()
        clock.now += with_guesses if payoff.is_on else 1.0
        was_on.append(payoff.is_on)
        payoff.end(1, counts=True)
    share = sum(was_on[-1000:]) / 1000
    assert share < 0.1 if pays else share > 0.9


def test_steps_that_do_other_things_do_not_count() -> None:
    clock = Clock()
    payoff = Payoff(clock)
    for _ in range(100):
        payoff.begin()
        clock.now += 1
        payoff.end(1, counts=False)
        payoff.begin()
        payoff.end(0, counts=True)
    assert payoff.is_on
    assert payoff._tokens == {True: 0, False: 0}
