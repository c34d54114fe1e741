"""Continuations scored in batches, with a common context read once, are scored as one by one."""

import random
from typing import Any

import pytest
import torch

from mixture.small_mixtures import MODES, ROUTERS, Shelf, small_mixture, small_settings
from mixture.test_mixture_scoring import naive_log_probs
from nn.small_experts import BOS, small_expert
from nn.trained_sparse import trained
from pyper.errors import PromptError
from pyper.evaluate.harness_plan import Ask, batches_of
from pyper.evaluate.harness_scores import Answer, final_weights, rolling_windows, score
from pyper.mixture import Mixture


def questions(n_contexts: int, longest: int = 40, seed: int = 0) -> list[Ask]:
    """One to four continuations of each context, in no order; some contexts share a beginning."""
    rng = random.Random(seed)
    story = [rng.randrange(1, 17) for _ in range(longest)]
    asks = []
    for number in range(n_contexts):
        n = rng.randrange(longest - 6)
        own = story[:n] if number % 2 else [rng.randrange(1, 17) for _ in range(n)]
        for _ in range(rng.randint(1, 4)):
            length = rng.randint(1, longest - 1 - n)
            continuation = tuple(rng.randrange(1, 17) for _ in range(length))
            asks.append(Ask((BOS, *own), continuation))
    rng.shuffle(asks)
    return asks


def by_hand(mixture: Mixture, ask: Ask) -> Answer:
    said = torch.stack(naive_log_probs(mixture, list(ask.read)))[ask.asked]
    wanted = torch.tensor(ask.continuation)
    return Answer(
        said.gather(1, wanted[:, None]).squeeze(1), bool((said.argmax(1) == wanted).all())
    )


def greedy_continuation(mixture: Mixture, context: tuple[int, ...], length: int) -> Ask:
    tokens = list(context)
    for _ in range(length):
        tokens.append(int(mixture.log_probs(torch.tensor([tokens]))[0, -1].argmax()))
    return Ask(context, tuple(tokens[len(context) :]))


def assert_same(got: list[Answer], expected: list[Answer], atol: float = 1e-5) -> None:
    assert [g.is_greedy for g in got] == [e.is_greedy for e in expected]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.log_probs, other.log_probs.float(), atol=atol, rtol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("router", ROUTERS)
def test_scores_match_the_obvious_loop(mode: dict[str, Any], router: str) -> None:
    mixture = small_mixture(router, **mode)
    asks = questions(3, longest=24)
    asks.insert(2, greedy_continuation(mixture, asks[0].context, 3))
    asks.append(
        Ask(asks[2].context, (*asks[2].continuation[:-1], asks[2].continuation[-1] % 16 + 1))
    )
    expected = [by_hand(mixture, ask) for ask in asks]
    assert expected[2].is_greedy
    assert not expected[-1].is_greedy

    assert_same(score(mixture, asks, batch_tokens=100), expected)


@pytest.mark.parametrize("batch_tokens", [1, 50, 333, 100_000])
@pytest.mark.parametrize("router", ["unigram", "lm"])
def test_answers_depend_neither_on_the_size_of_batches_nor_on_the_order(
    batch_tokens: int, router: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture, asks = small_mixture(router, mixing="top1"), questions(12)
    expected = [answer for ask in asks for answer in score(mixture, [ask])]
    monkeypatch.setattr("pyper.evaluate.harness_scores._LOGITS_AT_ONCE", 2**10)  # a few rows

    assert_same(score(mixture, asks, batch_tokens=batch_tokens), expected, atol=1e-6)
    back = score(mixture, asks[::-1], batch_tokens=batch_tokens)
    assert_same(back[::-1], expected, atol=1e-6)


@pytest.mark.parametrize("name", ["expert choice", "top 2, sign bias", "token mixture"])
def test_routed_models_score_as_their_plain_pass(name: str) -> None:
    model = trained(name)
    mixture = Mixture(small_settings(experts=("one",), top_k=1), [lambda: model], None)
    asks = questions(6)
    expected = []
    for ask in asks:
        said = mixture.log_probs(torch.tensor([ask.read]))[0, ask.asked]
        wanted = torch.tensor(ask.continuation)
        is_greedy = bool((said.argmax(1) == wanted).all())
        expected.append(Answer(said.gather(1, wanted[:, None]).squeeze(1), is_greedy))

    assert_same(score(mixture, asks), expected)


def test_a_common_context_is_read_once() -> None:
    shelf = Shelf()
    context = (BOS, *[1 + i % 16 for i in range(39)])
    asks = [Ask(context, (1 + i, 2, 3)) for i in range(4)]

    score(shelf.mixture(), asks, greedy=False)

    # 32 of the 40 fill pages; the rest and two tokens of the continuation are read four times.
    needed = 32 + 4 * (8 + 2)
    assert all(needed <= n <= needed + 8 for n in shelf.n_read), shelf.n_read  # whole tiles
    apart = 4 * 42
    assert max(shelf.n_read) < apart / 2


def test_batches_hold_what_they_may_and_every_question_once() -> None:
    asks = questions(30)
    batches = list(batches_of(asks, 120))
    assert sorted(place for batch in batches for place in batch.places) == [*range(len(asks))]
    sizes = [sum(len(tokens) for tokens, _ in batch.passes) for batch in batches]
    assert max(sizes) <= 120
    assert len(batches) < len(asks) / 2


def test_what_does_not_fit_the_context_is_refused() -> None:
    mixture = small_mixture()
    with pytest.raises(PromptError, match="49 tokens do not fit the context of 48"):
        score(mixture, [Ask((BOS,), (1,)), Ask((BOS,), (1,) * 49)])
    [answer] = score(mixture, [Ask((BOS,), (1,) * 48)])
    assert len(answer.log_probs) == 48


def test_progress_adds_up() -> None:
    asks, told = questions(12), []
    score(small_mixture(), asks, batch_tokens=60, on_done=told.append)
    assert sum(told) == len(asks)
    assert len(told) > 3


@pytest.mark.parametrize("mode", MODES)
def test_final_weights_are_those_of_the_next_prediction(mode: dict[str, Any]) -> None:
    mixture = small_mixture(**mode)
    for n in (1, 6, 7, 30):
        tokens = [BOS, *[1 + 3 * i % 16 for i in range(n - 1)]]
        expected = mixture.log_weights(torch.tensor([tokens]))[0, -1].exp().tolist()
        assert final_weights(mixture, tokens) == pytest.approx(expected, abs=1e-6)


def test_rolling_windows_ask_for_every_token_once_as_lm_eval_does() -> None:
    utils = pytest.importorskip("lm_eval.utils")
    for n in range(30):
        for context in range(1, 12):
            text = [*range(100, 100 + n)]
            windows = rolling_windows(text, BOS, context)
            assert [t for ask in windows for t in ask.continuation] == text
            theirs = map(
                utils.make_disjoint_window, utils.get_rolling_token_windows(text, BOS, context, 1)
            )
            assert [(list(a.context), list(a.continuation)) for a in windows] == list(theirs)


def test_experts_of_different_shapes_may_be_mixed() -> None:
    models = [small_expert(0, std=0.4), small_expert(1, std=0.4, n_layers=1, n_kv_heads=2)]
    settings = small_settings(experts=("a", "b"), router="experts")
    mixture = Mixture(settings, [lambda: models[0], lambda: models[1]], None)
    asks = questions(3, longest=16)
    assert_same(score(mixture, asks), [by_hand(mixture, ask) for ask in asks])
