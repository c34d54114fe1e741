"""Gather and combine against loops over tokens and experts, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.on_triton import (
    error,
    kernels,
    leaf,
    limit,
    needs_triton,
    poisoned,
    random,
    random_index,
)
from pyper.kernels import (
    combine_rows,
    combine_rows_torch,
    gather_rows,
    gather_rows_torch,
    rows,
    slots_of,
    slots_of_torch,
)

DTYPES = [torch.float32, torch.bfloat16]


def naive_combine(
    rows: Tensor, index: Tensor, n_tokens: int, gates: Tensor | None, residual: Tensor | None
) -> Tensor:
    """Token by token."""
    out = []
    for n in range(n_tokens):
        total = torch.zeros_like(rows[0, 0]) if residual is None else residual[n]
        for e, members in enumerate(index.tolist()):
            if n in members:
                weight = 1.0 if gates is None else gates[n, e]
                total = total + weight * rows[e, members.index(n)]
        out.append(total)
    return torch.stack(out)


def compare_combine(
    shape: tuple[int, int, int, int], gated: bool, added: bool, dtype: torch.dtype, seed: int = 0
) -> None:
    N, C, D, E = shape
    index = random_index(N, E, C, seed)
    given = [
        random(E, C, D, seed=seed, dtype=dtype),
        random(N, E, seed=seed + 1) if gated else None,
        random(N, D, seed=seed + 2, dtype=dtype) if added else None,
    ]
    ours = [None if t is None else leaf(t) for t in given]
    reference = [None if t is None else leaf(t, torch.float64) for t in given]
    pull = random(N, D, seed=seed + 3, dtype=dtype)
    with kernels():
        out = combine_rows(ours[0], index, slots_of(index, N), *ours[1:])
        out.backward(pull)
    expected = naive_combine(reference[0], index, N, *reference[1:])
    expected.backward(pull.double())

    assert out.dtype == dtype
    assert error(out, expected) < limit(dtype)
    for mine, theirs in zip(ours, reference, strict=True):
        assert mine is None or error(mine.grad, theirs.grad) < limit(dtype)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_the_kernel_combines_and_gives_gradients(
    gated: bool, added: bool, dtype: torch.dtype
) -> None:
    compare_combine((13, 5, 19, 3), gated, added, dtype)


@needs_triton
def test_rows_longer_than_a_block_are_summed_to_their_end() -> None:
    compare_combine((3, 2, 4100, 2), True, True, torch.float32)


@needs_triton
@settings(max_examples=8, deadline=None)
@given(
    N=st.integers(1, 12),
    share=st.floats(0.1, 1),
    D=st.integers(1, 70),
    E=st.integers(1, 64),
    gated=st.booleans(),
    added=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_shape_can_be_combined(
    N: int,
    share: float,
    D: int,
    E: int,
    gated: bool,
    added: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    compare_combine((N, max(1, int(share * N)), D, E), gated, added, dtype, seed)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 24, 2100])
def test_the_kernel_gathers_and_sums_gradients(D: int, dtype: torch.dtype) -> None:
    N, E, C = 11, 3, 6
    index = random_index(N, E, C)
    x, pull = random(N, D, dtype=dtype), random(E, C, D, seed=1, dtype=dtype)
    ours, reference = leaf(x), leaf(x, torch.float64)
    with kernels():
        out = gather_rows(ours, index, slots_of(index, N))
        out.backward(pull)
    expected = torch.stack([torch.stack([reference[n] for n in row]) for row in index.tolist()])
    expected.backward(pull.double())

    assert torch.equal(out.double(), expected)
    assert error(ours.grad, reference.grad) < limit(dtype)


@needs_triton
def test_strides_do_not_matter() -> None:
    index, slots = random_index(9, 3, 4), slots_of(random_index(9, 3, 4), 9)
    x, parts, gates = random(9, 6), random(3, 4, 6), random(9, 3)
    with kernels():
        for tidy, strided in ((t, t.mT.contiguous().mT) for t in (x, parts)):
            assert not strided.is_contiguous()
            function = gather_rows if tidy is x else combine_rows
            expected, leaf_ = function(tidy, index, slots), leaf(tidy)
            out = function(strided, index.T.contiguous().T, slots.T.contiguous().T)
            assert torch.equal(out, expected)
            function(leaf_, index, slots).sum().backward()  # a gradient without strides
            assert leaf_.grad.isfinite().all()
        out = combine_rows(parts, index, slots, gates.T.contiguous().T, x.T.contiguous().T)
        assert torch.equal(out, combine_rows(parts, index, slots, gates, x))


@needs_triton
def test_tokens_without_an_expert_pass_through_bit_for_bit() -> None:
    index = torch.tensor([[0, 2], [2, 0]]).to(random(1).device)
    residual = random(4, 9, dtype=torch.bfloat16)
    with kernels():
        out = combine_rows(
            random(2, 2, 9, dtype=torch.bfloat16), index, slots_of(index, 4), residual=residual
        )
    assert torch.equal(out[[1, 3]], residual[[1, 3]])
    assert not torch.equal(out[[0, 2]], residual[[0, 2]])


@needs_triton
def test_combining_twice_gives_the_same_bits() -> None:
    index = random_index(64, 8, 48)
    parts, gates = random(8, 48, 33), random(64, 8)
    slots = slots_of_torch(index, 64)
    first, second = (rows.sum_rows(parts, slots, gates) for _ in range(2))
    assert torch.equal(first, second)


@needs_triton
def test_the_order_of_an_experts_tokens_changes_no_bit() -> None:
    """Sums go by expert, not by place: atomics would add in the order of arrival."""
    index = random_index(64, 8, 48)
    parts = random(8, 48, 33)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1)).to(index.device)
    first = rows.sum_rows(parts, slots_of_torch(index, 64))
    moved = rows.sum_rows(
        parts[:, order].contiguous(), slots_of_torch(index[:, order].contiguous(), 64)
    )
    assert torch.equal(first, moved)


@needs_triton
def test_every_row_is_written() -> None:
    index = random_index(37, 3, 9)
    slots = slots_of_torch(index, 37)
    x, parts, gates = random(37, 50), random(3, 9, 50), random(37, 3)
    with poisoned():
        outs = [
            rows.take_rows(x, index),
            rows.sum_rows(parts, slots),
            rows.sum_rows(parts, slots, gates, x, gates, random(3, 50)),
            *rows.combine_gradients(x, parts, gates, index),
        ]
    assert all(out.isfinite().all() for out in outs)


@needs_triton
def test_a_product_can_be_added_on_the_way() -> None:
    index = random_index(21, 5, 8)
    parts, a, b = random(5, 8, 40), random(21, 5, seed=1), random(5, 40, seed=2)
    slots = slots_of_torch(index, 21)
    out = rows.sum_rows(parts, slots, None, None, a, b)
    expected = naive_combine(parts.double(), index, 21, None, a.double() @ b.double())
    assert error(out, expected) < 1e-6


def test_the_twins_gradients_are_those_of_their_values() -> None:
    index = random_index(6, 3, 4)
    slots = slots_of_torch(index, 6)
    x, parts, gates = random(6, 5).double(), random(3, 4, 5).double(), random(6, 3).double()
    assert torch.autograd.gradcheck(lambda x: gather_rows_torch(x, index, slots), leaf(x))
    assert torch.autograd.gradcheck(
        lambda *given: combine_rows_torch(given[0], index, slots, *given[1:]),
        (leaf(parts), leaf(gates), leaf(x)),
    )


@pytest.mark.parametrize("gated", [False, True])
def test_the_twin_is_the_loop(gated: bool) -> None:
    index = random_index(9, 4, 3)
    parts, gates = random(4, 3, 7).double(), random(9, 4).double() if gated else None
    residual = random(9, 7, seed=3).double()
    out = combine_rows_torch(parts, index, slots_of_torch(index, 9), gates, residual)
    assert error(out, naive_combine(parts, index, 9, gates, residual)) < 1e-12
