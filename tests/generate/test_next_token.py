import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyper.errors import PromptError
from pyper.generate import SamplingBatch, SamplingConfig, draw, filtered_probs

CPU = torch.device("cpu")


def log_probs(seed: int = 0, n: int = 12) -> Tensor:
    return (3 * torch.randn(n, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)


def draw_many(
    scores: Tensor, config: SamplingConfig, n: int, seed: int = 0, seen: tuple[int, ...] = ()
) -> Tensor:
    """n tokens, drawn in one batch of equal rows."""
    uniforms = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    has = torch.zeros(len(scores), dtype=torch.bool)
    has[list(seen)] = True
    batch = SamplingBatch.of([config] * n, CPU)
    return draw(scores.expand(n, -1), batch, uniforms, has.expand(n, -1))


def draw_one(
    scores: Tensor, config: SamplingConfig, seed: int = 0, seen: tuple[int, ...] = ()
) -> int:
    return int(draw_many(scores, config, 1, seed, seen))


def naive_filter(scores: Tensor, config: SamplingConfig) -> list[float]:
    probs = [math.exp(s) for s in scores.tolist()]
    order = sorted(range(len(probs)), key=lambda i: -probs[i])[: config.top_k]
    total = sum(probs[i] for i in order)
    kept, reached = [], 0.0
    for i in order:
        if reached >= config.top_p:
            break
        kept.append(i)
        reached += probs[i] / total
    kept = [i for i in kept if probs[i] >= config.min_p * probs[order[0]]]
    total = sum(probs[i] for i in kept)
    return [probs[i] / total if i in kept else 0.0 for i in range(len(probs))]


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 1000),
    top_k=st.sampled_from([None, 1, 2, 5, 12, 99]),
    top_p=st.sampled_from([1e-6, 0.3, 0.77, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
)
def test_filters_match_their_obvious_loops(
    seed: int, top_k: int | None, top_p: float, min_p: float
) -> None:
    config = SamplingConfig(top_k=top_k, top_p=top_p, min_p=min_p)
    got = filtered_probs(log_probs(seed)[None], SamplingBatch.of([config], CPU))
    torch.testing.assert_close(got[0], torch.tensor(naive_filter(log_probs(seed), config)))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(*(st.integers(0, 4) for _ in range(5))), min_size=2, max_size=6))
def test_rows_with_different_settings_do_not_disturb_each_other(
    choices: list[tuple[int, ...]],
) -> None:
    configs = [
        SamplingConfig(
            temperature=[0.0, 0.3, 1.0, 2.0, 1e-38][t],
            top_k=[None, 1, 3, 12, 99][k],
            top_p=[1.0, 0.5, 0.9, 0.01, 1.0][p],
            min_p=[0.0, 0.1, 1.0, 0.0, 0.3][m],
            repetition_penalty=[1.0, 1.0, 2.0, 0.5, 1.3][r],
        )
        for t, k, p, m, r in choices
    ]
    n = len(configs)
    scores = torch.stack([log_probs(seed) for seed in range(n)])
    seen, uniforms = scores > -3, torch.linspace(0, 0.99, n)
    together = draw(scores, SamplingBatch.of(configs, CPU), uniforms, seen)
    for i in range(n):
        row = slice(i, i + 1)
        alone = draw(scores[row], SamplingBatch.of(configs[row], CPU), uniforms[row], seen[row])
        assert int(alone) == int(together[i])


def test_temperature_zero_takes_the_likeliest_whatever_the_filters() -> None:
    for seed in range(20):
        config = SamplingConfig(temperature=0, top_k=3, top_p=0.5, min_p=0.3, seed=seed)
        assert draw_one(log_probs(seed), config, seed) == int(log_probs(seed).argmax())


@pytest.mark.parametrize("temperature", [1e-3, 1e-38, 5e-324])
def test_the_lowest_temperatures_take_the_likeliest(temperature: float) -> None:
    config = SamplingConfig(temperature=temperature)
    for seed in range(20):
        assert draw_one(log_probs(seed), config, seed) == int(log_probs(seed).argmax())


def test_a_high_temperature_flattens() -> None:
    config = SamplingConfig(temperature=1e30)
    assert set(draw_many(log_probs(), config, 400).tolist()) == set(range(12))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_distribution(temperature: float) -> None:
    scores = log_probs(n=5) / 2
    drawn = draw_many(scores, SamplingConfig(temperature=temperature), 4000)
    expected = (scores / temperature).softmax(-1)
    shares = torch.bincount(drawn, minlength=5) / 4000
    # Four standard deviations of a share.
    assert ((shares - expected).abs() < 4 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_a_token_that_is_filtered_out_is_never_drawn() -> None:
    config = SamplingConfig(temperature=1.0, top_k=3)
    best = set(log_probs().topk(3).indices.tolist())
    assert set(draw_many(log_probs(), config, 400).tolist()) == best


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_ends_of_chance_give_possible_tokens(uniform: float) -> None:
    scores = torch.tensor([[-math.inf, 0.3, 0.3, -math.inf, 0.4, -math.inf]]).log_softmax(-1)
    batch = SamplingBatch.of([SamplingConfig(temperature=1.0)], CPU)
    assert int(draw(scores, batch, torch.tensor([uniform]))) == (1 if uniform == 0 else 4)


@pytest.mark.parametrize("penalty", [1.3, 2.0, 0.5])
def test_repetition_penalty_multiplies_what_was_seen_once(penalty: float) -> None:
    seen = (4, 4, 4, 7, 1)
    config = SamplingConfig(temperature=0.0, repetition_penalty=penalty)
    for seed in range(30):
        scores = log_probs(seed).tolist()
        naive = [s * penalty if i in (1, 4, 7) else s for i, s in enumerate(scores)]
        assert draw_one(log_probs(seed), config, seen=seen) == naive.index(max(naive))


def test_repetition_penalty_changes_the_draws_too() -> None:
    scores = torch.tensor([0.6, 0.4]).log()
    config = SamplingConfig(temperature=1.0, repetition_penalty=50.0)
    assert set(draw_many(scores, config, 50, seen=(0,)).tolist()) == {1}


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"stop": ("end", "")},
        {"seed": 2**64},
        {"seed": -(2**63) - 1},
    ],
)
def test_values_out_of_range_are_refused_with_a_way_out(wrong: dict[str, Any]) -> None:
    [(name, value)] = wrong.items()
    with pytest.raises(PromptError, match=f"`{name}` must be") as caught:
        SamplingConfig(**wrong)
    assert repr(value) in str(caught.value)
    assert caught.value.hint == f"change `--{name.replace('_', '-')}`"


def test_the_ends_of_the_ranges_are_allowed() -> None:
    SamplingConfig(max_new_tokens=1, temperature=0, top_k=1, top_p=1.0, min_p=1.0)
