"""Expert choice and its inverse index."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.hopper import run_for_hopper
from kernels.on_triton import DEVICE, kernels, needs_triton, poisoned, random, random_index
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


def highest(scores: Tensor, capacity: int) -> Choice:
    """By a stable sort: the first of equal scores, places in the order of tokens."""
    ordered = scores.T.sort(dim=-1, descending=True, stable=True)
    index = ordered.indices[:, :capacity].sort(dim=-1).values
    return Choice(index, slots_of_torch(index, len(scores)), ordered.values[:, capacity - 1])


def compare(scores: Tensor, capacity: int) -> None:
    """To the last bit, NaN included. On a GPU torch's stable sort puts negative NaN last."""
    with kernels(), poisoned():
        picked = choose(scores, capacity)
    expected = highest(scores.cpu(), capacity)
    assert torch.equal(picked.token_index.cpu(), expected.token_index)
    assert torch.equal(picked.slots.cpu(), expected.slots)
    assert picked.slots.dtype == torch.int32
    got, wanted = picked.kth_score.cpu(), expected.kth_score
    assert torch.allclose(got, wanted, rtol=0, atol=0, equal_nan=True)


SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40, 3e38, torch.inf, -torch.inf, torch.nan, -torch.nan]


def scores_of(kind: str, N: int, E: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(N, E, generator=generator)
    drawn = torch.randint(len(SPECIAL), (N, E), generator=generator)
    if kind == "gates":
        scores = (4 * scores).softmax(dim=-1)
    elif kind == "ties":
        scores = scores.round()
    elif kind == "padding":
        scores[drawn[:, 0] < 7] = -torch.inf
    elif kind == "special":
        scores = torch.tensor(SPECIAL)[drawn]
    return scores.to(DEVICE)


KINDS = ["random", "gates", "ties", "padding", "special"]


@needs_triton
@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    N=st.integers(1, 300),
    E=st.integers(1, 70),
    share=st.floats(0, 1),
    seed=st.integers(0, 9),
)
def test_the_kernels_choose_as_a_stable_sort(
    kind: str, N: int, E: int, share: float, seed: int
) -> None:
    compare(scores_of(kind, N, E, seed), max(1, int(share * N)))


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("N", "E"), [(1, 1), (1025, 1), (1500, 8), (20, 70)])
def test_one_token_and_all(N: int, E: int, kind: str) -> None:
    for capacity in (1, N):
        compare(scores_of(kind, N, E, 1), capacity)


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
def test_more_tokens_than_one_program_holds(kind: str) -> None:
    N = choice.HELD + 8192 + 100
    compare(scores_of(kind, N, 2, 3), N // 3)


@needs_triton
def test_the_kernels_choose_once_for_all_views_and_types() -> None:
    scores = random(90, 6)
    with kernels():
        plain, turned = choose(scores, 20), choose(scores.T.contiguous().T, 20)
        narrow = choose(scores.bfloat16(), 20)
    assert torch.equal(plain.token_index, turned.token_index)
    assert torch.equal(plain.slots, turned.slots)
    assert narrow.kth_score.dtype == torch.bfloat16
    assert narrow.token_index.shape == (6, 20)


@needs_triton
def test_what_compilers_are_told_of_the_operator_is_true() -> None:
    with kernels():
        torch.library.opcheck(choice.choose_highest, (random(9, 3), 4))


@needs_triton
@pytest.mark.parametrize("share", [0.01, 0.5, 1])
def test_the_kernel_inverts_any_choice(share: float) -> None:
    index = random_index(300, 5, int(share * 300))
    with kernels():
        assert torch.equal(slots_of(index, 300), slots_of_torch(index, 300))


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


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
@needs_triton
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("N", "E"), [(32_768, 8), (131_072, 64), (100_001, 7), (1_000_000, 8)])
def test_kernels_choose_as_a_stable_sort_at_real_sizes(N: int, E: int, kind: str) -> None:
    compare(scores_of(kind, N, E, 2), max(1, N // E))


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
@needs_triton
def test_a_cuda_graph_chooses_anew() -> None:
    scores = random(40_000, 8)
    choose(scores, 5000)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        picked = choose(scores, 5000)
    scores.copy_(random(40_000, 8, seed=1))
    graph.replay()
    assert torch.equal(picked.token_index, highest(scores, 5000).token_index)


BUILD = """
import importlib
from kernels.hopper import build, spilled_bytes

module = importlib.import_module("pyper.kernels.choice")
TYPES = {"scores_ptr": "*fp32", "kth_ptr": "*fp32", "index_ptr": "*i64"}

def check(name, warps, whole, **constants):
    kernel = getattr(module, name)
    sizes = {n for n in ("N", "C", "width") if n in kernel.arg_names} - set(constants)
    types = dict.fromkeys(sizes, "i32") | TYPES
    even = sizes if whole else sizes & {"width"}
    built = build(kernel, types, constants, default="*i32", whole=even, num_warps=warps)
    assert built.metadata.shared <= 227 * 1024, name
    assert spilled_bytes(built.asm["ptx"]) == [0, 0], (name, constants)

for whole in (True, False):
    for E, chunk, block_e in ((1, 1024, 1), (8, 512, 8), (64, 64, 64), (100, 64, 64)):
        for name in ("_write_keys", "_place"):
            check(name, 4, whole, E=E, CHUNK=chunk, BLOCK_E=block_e)
    for block, steps in ((32768, 1), (8192, 1), (16384, 8)):
        for chunk in (64, 512, 1024):
            check("_find_kth", min(block // 512, 32), whole, BLOCK=block, STEPS=steps, CHUNK=chunk)
"""


@needs_triton
@pytest.mark.slow
def test_the_kernels_build_for_a_large_gpu_and_keep_to_their_registers() -> None:
    run_for_hopper(BUILD)
