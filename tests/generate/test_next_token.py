import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyper.errors import PromptError
from pyper.generate import SamplingConfig, filtered_probs, next_token

NOTHING = torch.tensor([], dtype=torch.long)


def log_probs(seed: int = 0, n: int = 12) -> Tensor:
    return (3 * torch.randn(n, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)


def draw(scores: Tensor, config: SamplingConfig, seed: int = 0, seen: Tensor = NOTHING) -> int:
    return next_token(scores, seen, config, torch.Generator().manual_seed(seed))


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
    got = filtered_probs(log_probs(seed), config)
    torch.testing.assert_close(got, torch.tensor(naive_filter(log_probs(seed), config)))


def test_temperature_zero_takes_the_likeliest_whatever_the_filters() -> None:
    for seed in range(20):
        config = SamplingConfig(temperature=0, top_k=3, top_p=0.5, min_p=0.3, seed=seed)
        assert draw(log_probs(seed), config, seed) == int(log_probs(seed).argmax())


@pytest.mark.parametrize("temperature", [1e-3, 1e-38, 5e-324])
def test_the_lowest_temperatures_take_the_likeliest(temperature: float) -> None:
    config = SamplingConfig(temperature=temperature)
    for seed in range(20):
        assert draw(log_probs(seed), config, seed) == int(log_probs(seed).argmax())


def test_a_high_temperature_flattens() -> None:
    config = SamplingConfig(temperature=1e30)
    drawn = {draw(log_probs(), config, seed) for seed in range(400)}
    assert drawn == set(range(12))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_distribution(temperature: float) -> None:
    config, generator = SamplingConfig(temperature=temperature), torch.Generator().manual_seed(0)
    scores = log_probs(n=5) / 2
    drawn = [next_token(scores, NOTHING, config, generator) for _ in range(4000)]
    expected = (scores / temperature).softmax(-1)
    shares = torch.bincount(torch.tensor(drawn), minlength=5) / 4000
    # Four standard deviations of a share.
    assert ((shares - expected).abs() < 4 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_a_token_that_is_filtered_out_is_never_drawn() -> None:
    config = SamplingConfig(temperature=1.0, top_k=3)
    best = set(log_probs().topk(3).indices.tolist())
    assert {draw(log_probs(), config, seed) for seed in range(200)} == best


def test_a_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    def tokens(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        config = SamplingConfig(temperature=1.0)
        return [next_token(log_probs(i) / 3, NOTHING, config, generator) for i in range(30)]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


@pytest.mark.parametrize("penalty", [1.3, 2.0, 0.5])
def test_repetition_penalty_multiplies_what_was_seen_once(penalty: float) -> None:
    seen = torch.tensor([4, 4, 4, 7, 1])
    config = SamplingConfig(temperature=0.0, repetition_penalty=penalty)
    for seed in range(30):
        scores = log_probs(seed).tolist()
        naive = [s * penalty if i in (1, 4, 7) else s for i, s in enumerate(scores)]
        assert draw(log_probs(seed), config, seen=seen) == naive.index(max(naive))


def test_repetition_penalty_changes_the_draws_too() -> None:
    scores = torch.tensor([0.6, 0.4]).log()
    config = SamplingConfig(temperature=1.0, repetition_penalty=50.0)
    drawn = {draw(scores, config, seed, torch.tensor([0])) for seed in range(50)}
    assert drawn == {1}


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
