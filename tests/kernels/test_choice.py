"""Expert choice and its inverse index."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.on_triton import kernels, needs_triton, poisoned, random, random_index
from pyper.kernels import Choice, choice, choose, slots_of, slots_of_torch


def chosen(scores: Tensor, capacity: int) -> list[set[int]]:
    """By sorting."""
    columns = scores.T.tolist()
    return [
        set(sorted(range(len(column)), key=lambda n: -column[n])[:capacity]) for column in columns
    ]


def check(picked: Choice, scores: Tensor, capacity: int) -> None:
    expected = chosen(scores, capacity)
    assert [set(row) for row in picked.token_index.tolist()] == expected
    lowest = [min(scores[n, e].item() for n in taken) for e, taken in enumerate(expected)]
    assert picked.kth_score.tolist() == pytest.approx(lowest)
    for n, row in enumerate(picked.slots.tolist()):
        for e, slot in enumerate(row):
            assert (slot >= 0) == (n in expected[e])
            assert slot == -1 or picked.token_index[e, slot] == n


@pytest.mark.parametrize("capacity", [1, 4, 20])
def test_each_expert_takes_its_highest_scores(capacity: int) -> None:
    scores = random(20, 5)
    check(choose(scores, capacity), scores, capacity)


@needs_triton
@settings(max_examples=10, deadline=None)
@given(N=st.integers(1, 40), E=st.integers(1, 64), share=st.floats(0.01, 1), seed=st.integers(0, 9))
def test_the_kernel_inverts_any_choice(N: int, E: int, share: float, seed: int) -> None:
    scores, capacity = random(N, E, seed=seed), max(1, int(share * N))
    with kernels():
        check(choose(scores, capacity), scores, capacity)


@needs_triton
def test_kernel_and_twin_agree_and_every_slot_is_written() -> None:
    index = random_index(3000, 3, 1500)  # more places than a block holds
    with poisoned():
        slots = choice.invert(index, 3000)
    assert torch.equal(slots, slots_of_torch(index, 3000))
    assert slots.dtype == torch.int32


def test_padding_is_never_taken_while_there_are_tokens() -> None:
    scores = random(12, 3)
    padding = torch.arange(12, device=scores.device) % 2 == 0
    picked = choose(scores, 6, padding)
    assert not padding[picked.token_index].any()
    assert (picked.slots[padding] == -1).all()


def test_a_choice_has_no_gradient() -> None:
    picked = choose(random(8, 2).requires_grad_(), 3)
    assert not picked.kth_score.requires_grad
    assert torch.equal(picked.slots, slots_of(picked.token_index, 8))
