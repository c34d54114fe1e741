"""Decoding step by step gives what scoring gives, and runs no expert for nothing."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mixture.small_mixtures import MODES, ROUTERS, Shelf, small_mixture
from nn.small_experts import BOS, text_of
from pyper.generate.mixture_reader import MixtureReader
from pyper.mixture import Mixture

LENGTH = 17


def texts(n: int, length: int = LENGTH) -> Tensor:
    tokens = text_of(n, length)
    tokens[:, 0] = BOS
    return tokens


def decode(
    mixture: Mixture,
    tokens: Tensor,
    starts: list[int],
    ends: list[int] | None = None,
    prefill_chunk: int = 512,
    fixed_shapes: bool | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Give the texts (B, T) token by token from `starts` to `ends`: what is predicted of each.

    Rows (R,), their lengths (R,), log-probabilities (R, V) and weights (R, E) of every step.
    """
    reader = MixtureReader(
        mixture, cache_tokens=4096, prefill_chunk=prefill_chunk, fixed_shapes=fixed_shapes
    )
    texts = [
        reader.open(row[:start].tolist(), tokens.shape[1])
        for row, start in zip(tokens, starts, strict=True)
    ]
    stop = ends or [tokens.shape[1]] * len(tokens)
    while True:
        for text, end in zip(texts, stop, strict=True):
            if len(text.tokens) == end:
                reader.close(text)
        running = [t for t, end in zip(texts, stop, strict=True) if len(t.tokens) < end]
        if not running:
            assert reader.pool.n_used == 0
            return
        for said in reader.predict(reader.advance(running)):
            rows = [next(i for i, t in enumerate(texts) if t is text) for text in said.texts]
            lengths = [len(text.tokens) for text in said.texts]
            weights = torch.tensor([text.weights for text in said.texts])
            yield torch.tensor(rows), torch.tensor(lengths), said.log_probs, weights
            for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
                token = int(tokens[row, length])
                scores = said.per_expert[i, :, token].tolist()
                reader.append(texts[row], token, said.experts[i], scores)


def assert_decoding_equals_scoring(
    mixture: Mixture,
    tokens: Tensor,
    starts: list[int],
    ends: list[int] | None = None,
    prefill_chunk: int = 512,
) -> None:
    scored, weights = mixture.log_probs(tokens), mixture.log_weights(tokens).exp()
    n_steps = 0
    for rows, lengths, log_probs, used in decode(mixture, tokens, starts, ends, prefill_chunk):
        expected = scored[rows, lengths - 1]
        torch.testing.assert_close(log_probs, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(used, weights[rows, lengths - 1], atol=1e-5, rtol=1e-5)
        n_steps += len(rows)
    assert n_steps == sum(ends or [LENGTH] * len(starts)) - sum(starts)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("router", ROUTERS)
def test_decoding_equals_scoring(mode: dict[str, Any], router: str) -> None:
    # A bare document token, prompts around the prefix and window lengths, a long one.
    assert_decoding_equals_scoring(small_mixture(router, **mode), texts(6), [1, 2, 5, 6, 7, 13])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("router", ROUTERS)
def test_finished_rows_do_not_disturb_the_others(mode: dict[str, Any], router: str) -> None:
    mixture = small_mixture(router, **mode)
    assert_decoding_equals_scoring(mixture, texts(4), [3, 9, 1, 14], [LENGTH, 10, 12, 16])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("router", ROUTERS)
def test_prompts_read_in_small_parts_give_the_same(mode: dict[str, Any], router: str) -> None:
    mixture = small_mixture(router, **mode)
    assert_decoding_equals_scoring(mixture, texts(4), [1, 5, 8, 14], prefill_chunk=3)


@pytest.mark.parametrize("router", ROUTERS)
def test_prices_apply_while_decoding(router: str) -> None:
    prices = {"prices": (0.9, -0.4, 0.3, -0.8), "price_scale": 1.0}
    mixture = small_mixture(router, mixing="top1", **prices)
    assert_decoding_equals_scoring(mixture, texts(6), [1, 2, 5, 6, 7, 13])


@pytest.mark.parametrize("mode", [MODES[1], *MODES[3:]])
@pytest.mark.parametrize("router", ROUTERS)
def test_a_batch_equals_each_row_alone(mode: dict[str, Any], router: str) -> None:
    mixture, tokens, starts = small_mixture(router, **mode), texts(3), [8, 1, 13]
    together: dict[tuple[int, int], Tensor] = {}
    for rows, lengths, log_probs, _ in decode(mixture, tokens, starts):
        for i, key in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True)):
            together[key] = log_probs[i]
    for row, start in enumerate(starts):
        for _, lengths, log_probs, _ in decode(mixture, tokens[row : row + 1], [start]):
            expected = together[row, int(lengths)]
            torch.testing.assert_close(log_probs[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("resident", [1, 2])
def test_few_experts_in_memory_give_the_same(resident: int) -> None:
    shelf = Shelf()
    assert_decoding_equals_scoring(shelf.mixture(resident, mixing="window"), texts(2), [3, 12])
    assert shelf.most == resident


@pytest.mark.parametrize("router", ["unigram", "lm"])
def test_top1_with_its_own_router_loads_one_expert_for_a_long_prompt(router: str) -> None:
    shelf, tokens = Shelf(), texts(1)
    mixture = shelf.mixture(1, router, mixing="top1")
    for _ in decode(mixture, tokens, [10]):
        pass
    assert shelf.loaded == [mixture.route(tokens[0])]
    assert sum(shelf.n_read) == LENGTH - 1  # each token once, and the last is not read


def test_a_short_prompt_settles_on_one_expert_after_the_cold_start() -> None:
    shelf, tokens = Shelf(), texts(1)
    mixture = shelf.mixture(router="unigram", mixing="top1")
    for _ in decode(mixture, tokens, [2]):
        pass
    chosen = mixture.route(tokens[0])
    assert shelf.n_read == [LENGTH - 1 if e == chosen else 6 for e in range(4)]


@pytest.mark.parametrize("start", [2, 10])
def test_experts_that_read_the_prefix_themselves_read_it_once(start: int) -> None:
    shelf, tokens = Shelf(), texts(1)
    mixture = shelf.mixture(router="experts", mixing="top1")
    for _, _, _, weights in decode(mixture, tokens, [start]):
        chosen = int(weights[0].argmax())
    assert shelf.n_read == [LENGTH - 1 if e == chosen else 7 for e in range(4)]


def test_experts_are_only_forgotten_once_every_row_has_settled() -> None:
    shelf, tokens = Shelf(), texts(3)
    mixture = shelf.mixture(router="experts", mixing="top1")
    assert_decoding_equals_scoring(mixture, tokens, [1, 4, 9], [LENGTH] * 3)


def test_the_posterior_reads_every_token_once_with_every_live_expert() -> None:
    shelf = Shelf()
    for _ in decode(shelf.mixture(top_k=2), texts(1), [5]):
        pass
    assert shelf.n_read == [LENGTH - 1] * 4


@torch.no_grad()
def test_pruned_experts_stop_for_good() -> None:
    shelf, tokens = Shelf(), texts(3)
    unpruned = small_mixture(top_k=4, temperature=0.5)
    posterior = unpruned.log_weights(tokens).exp()
    said = torch.stack([unpruned.expert(e)(tokens).softmax(-1) for e in range(4)], dim=-2)
    live = torch.ones(3, 4)
    for rows, lengths, log_probs, weights in decode(
        shelf.mixture(prune=0.02, top_k=4, temperature=0.5), tokens, [1, 1, 1]
    ):
        now = posterior[rows, lengths - 1]
        among_live = live[rows] * now
        live[rows] *= among_live / among_live.sum(-1, keepdim=True) >= 0.02
        expected = live[rows] * now
        expected /= expected.sum(-1, keepdim=True)
        torch.testing.assert_close(weights, expected, atol=1e-5, rtol=1e-5)
        mixed = (expected[..., None] * said[rows, lengths - 1]).sum(-2)
        torch.testing.assert_close(log_probs.exp(), mixed, atol=1e-5, rtol=1e-5)
    assert live.any(dim=-1).all()
    assert (live == 0).any(dim=-1).sum() >= 2
    assert sum(shelf.n_read) < 4 * 3 * (LENGTH - 1)


@pytest.mark.parametrize("prune", [0.25, 0.49])
def test_no_expert_is_pruned_before_the_text_speaks_against_it(prune: float) -> None:
    # So small a temperature that all weights stay near 1/4.
    mixture = small_mixture(prune=prune, top_k=4, temperature=1e-3)
    assert_decoding_equals_scoring(mixture, texts(2), [1, 1])
