"""Experts come, go and are loaded without touching the others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mixture.small_mixtures import (
    NAMES,
    Shelf,
    loaders_of,
    small_counts,
    small_experts,
    small_mixture,
    small_router,
    small_settings,
)
from nn.small_experts import text_of
from pyper.errors import CheckpointError
from pyper.mixture import Mixture, UnigramRouter
from pyper.nn import Transformer


def rebuilt(indices: list[int], names: tuple[str, ...], **changes: Any) -> Mixture:
    """A mixture made directly of some of five experts."""
    experts, counts = small_experts(5), small_counts(5)
    settings = small_settings(experts=names, **changes)
    router = UnigramRouter(counts[indices]) if settings.router == "unigram" else None
    return Mixture(settings, loaders_of([experts[i] for i in indices]), router)


def first_four(**changes: Any) -> Mixture:
    return rebuilt([0, 1, 2, 3], NAMES, **changes)


def fifth() -> Callable[[], Transformer]:
    return loaders_of(small_experts(5))[4]


MODES: list[dict[str, Any]] = [
    {"mixing": "posterior", "top_k": 2},
    {"mixing": "posterior", "top_k": 4},
    {"mixing": "top1"},
    {"mixing": "window"},
    {"mixing": "top1", "router": "experts"},
]


def assert_equal_mixtures(got: Mixture, expected: Mixture) -> None:
    assert got.settings == expected.settings
    tokens = text_of(4, 20)
    assert torch.equal(got.log_probs(tokens), expected.log_probs(tokens))
    for e in range(expected.n_experts):
        theirs = expected.expert(e).state_dict()
        for name, weight in got.expert(e).state_dict().items():
            assert torch.equal(weight, theirs[name])


@pytest.mark.parametrize("mode", MODES)
def test_an_added_expert_makes_the_mixture_of_five(mode: dict[str, Any]) -> None:
    got = first_four(**mode).with_expert("verse", fifth(), small_counts(5)[4])
    assert_equal_mixtures(got, rebuilt([0, 1, 2, 3, 4], (*NAMES, "verse"), **mode))


@pytest.mark.parametrize("mode", MODES)
def test_a_removed_expert_leaves_the_mixture_of_the_others(mode: dict[str, Any]) -> None:
    got = first_four(**mode).without_expert("maths")
    expected = rebuilt(
        [0, 2, 3], ("law", "novels", "code"), **mode | {"top_k": min(3, mode.get("top_k", 2))}
    )
    assert_equal_mixtures(got, expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_replaced_expert_makes_the_mixture_with_the_new_one(mode: dict[str, Any]) -> None:
    got = first_four(**mode).replace_expert("maths", fifth(), small_counts(5)[4])
    assert_equal_mixtures(got, rebuilt([0, 2, 3, 4], ("law", "novels", "code", "maths"), **mode))


def test_the_only_expert_can_be_replaced_but_not_removed() -> None:
    alone = rebuilt([0], ("law",), top_k=1)
    got = alone.replace_expert("law", fifth(), small_counts(5)[4])
    assert_equal_mixtures(got, rebuilt([4], ("law",), top_k=1))
    with pytest.raises(CheckpointError, match="at least one"):
        alone.without_expert("law")


def test_the_changed_mixture_leaves_the_first_one_as_it_was() -> None:
    mixture, tokens = first_four(), text_of(2, 20)
    before = mixture.log_probs(tokens)
    mixture.without_expert("law").log_probs(tokens)
    mixture.with_expert("verse", fifth(), small_counts(5)[4]).log_probs(tokens)
    assert mixture.settings.experts == NAMES
    assert torch.equal(mixture.log_probs(tokens), before)


def test_prices_do_not_survive_a_change_of_experts() -> None:
    priced = first_four(prices=(1.0, 2.0, -1.0, 0.5), price_scale=1.0)
    assert priced.without_expert("law").settings.prices == ()


def test_impossible_changes_name_what_is_there() -> None:
    mixture = first_four()
    with pytest.raises(CheckpointError, match="already has") as caught:
        mixture.with_expert("law", fifth(), small_counts(5)[4])
    assert caught.value.hint
    for change in (mixture.without_expert, lambda n: mixture.replace_expert(n, fifth(), None)):
        with pytest.raises(CheckpointError, match="no expert `poems`") as caught:
            change("poems")
        assert "law, maths, novels, code" in caught.value.hint
    for change in (mixture.with_expert, mixture.replace_expert):
        name = "verse" if change == mixture.with_expert else "law"
        with pytest.raises(CheckpointError, match="no token counts"):
            change(name, fifth(), None)
    lm = Mixture(small_settings(router="lm"), loaders_of(small_experts()), small_router("lm"))
    with pytest.raises(CheckpointError, match="unigram"):
        lm.without_expert("law")


@pytest.mark.parametrize("resident", [1, 2, 3])
def test_memory_holds_no_more_experts_than_allowed(resident: int) -> None:
    shelf, tokens = Shelf(), text_of(2, 20)
    mixture = shelf.mixture(resident)
    assert mixture.n_loaded == 0
    got = mixture.log_probs(tokens)
    assert shelf.most == mixture.n_loaded == resident
    assert torch.equal(got, small_mixture().log_probs(tokens))


def test_the_least_recently_used_expert_makes_room() -> None:
    shelf = Shelf()
    mixture = shelf.mixture(2)
    for e in (0, 1, 0, 2, 0, 1):
        mixture.expert(e)
    assert shelf.loaded == [0, 1, 2, 1]


def test_without_a_limit_each_expert_is_loaded_once() -> None:
    shelf = Shelf()
    mixture = shelf.mixture(None)
    for _ in range(3):
        mixture.log_probs(text_of(1, 9))
    assert shelf.loaded == [0, 1, 2, 3]


def test_routing_a_prompt_loads_no_expert() -> None:
    shelf = Shelf()
    assert shelf.mixture(1, mixing="top1").route(text_of(20)) is not None
    assert shelf.loaded == []
