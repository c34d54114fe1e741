"""Gated activations against their definitions, in float64."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.on_triton import (
    DEVICE,
    error,
    kernels,
    leaf,
    limit,
    needs_triton,
    poisoned,
    random,
    random_index,
)
from pyper.config.expert import Activation
from pyper.kernels import activate_rows, activate_rows_torch, activation

ACTIVATIONS = get_args(Activation)
DTYPES = [torch.float32, torch.bfloat16]


def naive(pre: Tensor, kind: str) -> Tensor:
    """By definition."""
    if kind == "gelu":
        return pre * 0.5 * (1 + torch.erf(pre / 2**0.5))
    if kind == "gelu_tanh":
        return 0.5 * pre * (1 + torch.tanh((2 / math.pi) ** 0.5 * (pre + 0.044715 * pre**3)))
    if kind == "relu2":
        return pre.clamp(min=0) ** 2
    gate, value = pre.split(pre.shape[-1] // 2, dim=-1)
    return gate / (1 + (-gate).exp()) * value


def naive_gated(pre: Tensor, kind: str, index: Tensor, gates: Tensor) -> Tensor:
    rows = [
        torch.stack([gates[n, e] * naive(pre[e, c], kind) for c, n in enumerate(members)])
        for e, members in enumerate(index.tolist())
    ]
    return torch.stack(rows)


def compare(
    shape: tuple[int, int, int, int], kind: Activation, dtype: torch.dtype, seed: int = 0
) -> None:
    N, C, width, E = shape
    index = random_index(N, E, C, seed)
    pre = 2 * random(E, C, 2 * width if kind == "swiglu" else width, seed=seed, dtype=dtype)
    gates, pull = random(N, E, seed=seed + 1), random(E, C, width, seed=seed + 2, dtype=dtype)
    ours, reference = [leaf(pre), leaf(gates)], [leaf(t, torch.float64) for t in (pre, gates)]
    with kernels():
        out = activate_rows(ours[0], kind, index, ours[1])
        out.backward(pull)
    expected = naive_gated(reference[0], kind, index, reference[1])
    expected.backward(pull.double())

    assert out.dtype == dtype
    assert error(out, expected) < limit(dtype)
    for mine, theirs in zip(ours, reference, strict=True):
        assert error(mine.grad, theirs.grad) < limit(dtype)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_kernel_gives_values_and_gradients_of_rows_and_gates(
    kind: Activation, dtype: torch.dtype
) -> None:
    compare((9, 4, 21, 3), kind, dtype)


@needs_triton
@settings(max_examples=8, deadline=None)
@given(
    N=st.integers(1, 8),
    width=st.integers(1, 80),
    E=st.integers(1, 8),
    kind=st.sampled_from(ACTIVATIONS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_shape_will_do(
    N: int, width: int, E: int, kind: Activation, dtype: torch.dtype, seed: int
) -> None:
    compare((N, max(1, N // 2), width, E), kind, dtype, seed)


@needs_triton
def test_rows_longer_than_a_block_are_summed_to_their_end() -> None:
    compare((3, 1, 4100, 2), "gelu", torch.float32)


@needs_triton
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_gates_can_be_left_out(kind: Activation) -> None:
    pre = random(2, 3, 10)
    ours, reference = leaf(pre), leaf(pre, torch.float64)
    with kernels():
        out = activate_rows(ours, kind)
        out.sum().backward()
    expected = naive(reference, kind)
    expected.sum().backward()
    assert error(out, expected) < 1e-6
    assert error(ours.grad, reference.grad) < 1e-6


@needs_triton
def test_gelu_keeps_its_digits_far_out_where_erf_has_none() -> None:
    """1 + erf(x/√2) cancels below −4; ours is right to 1e-5 of its own size down to −12."""
    x = torch.linspace(-12, 12, 2401, device=DEVICE).view(1, 1, -1)
    reference = leaf(x, torch.float64)
    expected = 0.5 * reference * torch.special.erfc(-reference / 2**0.5)
    expected.sum().backward()
    with kernels():
        ours = leaf(x)
        out = activate_rows(ours, "gelu")
        out.sum().backward()
    relative = (out.double() - expected).abs() / expected.abs().clamp(min=1e-300)
    assert relative[expected != 0].max() < 1e-5
    assert (ours.grad.double() - reference.grad).abs().max() < 1e-6


@needs_triton
def test_strides_do_not_matter() -> None:
    index, gates, pre = random_index(9, 3, 4), random(9, 3), random(3, 4, 10)
    with kernels():
        expected = activate_rows(pre, "gelu", index, gates)
        strided = [t.mT.contiguous().mT for t in (pre, index, gates)]
        assert torch.equal(activate_rows(strided[0], "gelu", *strided[1:]), expected)


@needs_triton
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_large_numbers_stay_finite(kind: Activation) -> None:
    pre = leaf(torch.tensor([[[-3e4, -90.0, 90.0, 3e4]]], device=DEVICE))
    with kernels():
        out = activate_rows(pre, kind)
        out.sum().backward()
    assert out.isfinite().all()
    assert pre.grad.isfinite().all()


@needs_triton
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_every_element_is_written_and_hidden_rows_come_again(kind: Activation) -> None:
    index, gates = random_index(9, 3, 4), random(9, 3)
    pre = random(3, 4, 34)
    with poisoned():
        hidden = activation.activation_forward(pre, kind, index, gates)
        dpre, dgates, again = activation.activation_gradients(hidden, pre, kind, index, gates, True)
    for out in (hidden, dpre, dgates):
        assert out.isfinite().all()
    assert error(again, hidden) < 1e-6


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_twin_is_the_definition_and_so_is_its_gradient(kind: Activation) -> None:
    index, gates = random_index(6, 3, 4), random(6, 3).double()
    pre = random(3, 4, 6).double()
    out = activate_rows_torch(pre, kind, index, gates)
    assert error(out, naive_gated(pre, kind, index, gates)) < 1e-12
    assert torch.autograd.gradcheck(
        lambda pre, gates: activate_rows_torch(pre, kind, index, gates), (leaf(pre), leaf(gates))
    )
