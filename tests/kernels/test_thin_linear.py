"""The linear map of few rows against a loop over rows, in float64."""

import importlib
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from kernels.on_triton import DEVICE, error, kernels, limit, needs_triton, poisoned, random
from pyper.config.expert import Activation
from pyper.kernels import InputNorm, ThinWeight, thin_blocks, thin_linear, thin_linear_torch
from pyper.kernels.thin_blocks import TICKETS, Blocks
from pyper.kernels.thin_linear import thin_residual

# B, D, N
SHAPES = [
    (1, 32, 16),
    (1, 96, 40),
    (1, 2500, 9),
    (1, 33, 5),
    (3, 300, 17),
    (16, 64, 33),
    (17, 48, 16),
    (64, 40, 24),
]
CHOICES: list[tuple[bool, bool, bool, Activation | None]] = [
    (False, False, False, None),
    (True, False, False, "gelu"),
    (True, True, False, "swiglu"),
    (False, False, True, None),
    (True, True, True, "relu2"),
    (False, True, False, "gelu_tanh"),
]
BF16 = torch.bfloat16
STORED = [BF16, torch.int8, torch.float8_e4m3fn]


def every(n: int, *values: Sequence[Any]) -> list[Any]:
    """All combinations; on a GPU each builds a kernel, and all but every n-th are slow tests."""
    slow = [pytest.mark.slow] if DEVICE == "cuda" else []
    cases = enumerate(itertools.product(*values))
    return [pytest.param(*case, marks=slow if i % n else []) for i, case in cases]


def weight_of(N: int, D: int, stored: torch.dtype, *, bias: bool) -> ThinWeight:
    weight = random(N, D, seed=1, dtype=torch.float32)
    own_bias = random(N, seed=2, dtype=BF16) if bias else None
    if stored == BF16:
        return ThinWeight(weight.to(BF16), None, own_bias)
    largest = 127.0 if stored == torch.int8 else 448.0
    scale = weight.abs().amax(dim=1) / largest
    narrow = weight / scale[:, None]
    narrow = narrow.round() if stored == torch.int8 else narrow
    return ThinWeight(narrow.to(stored), scale, own_bias)


def naive(
    x: Tensor,
    weight: ThinWeight,
    norm: InputNorm | None,
    activation: Activation | None,
    residual: Tensor | None,
) -> Tensor:
    rows = []
    for row in x.double():
        if norm is not None:
            row = row / (row.square().mean() + norm.eps).sqrt() * norm.gain.double()
        out = weight.weight.double() @ row
        if weight.scale is not None:
            out = out * weight.scale.double()
        if weight.bias is not None:
            out = out + weight.bias.double()
        if activation == "swiglu":
            gate, value = out.chunk(2)
            out = gate / (1 + (-gate).exp()) * value
        elif activation == "relu2":
            out = out.clamp(min=0) ** 2
        elif activation is not None:
            kind = "tanh" if activation == "gelu_tanh" else "none"
            out = torch.nn.functional.gelu(out, approximate=kind)
        rows.append(out)
    total = torch.stack(rows)
    return total if residual is None else residual.double() + total


def compare(
    function: object,
    shape: tuple[int, int, int],
    stored: torch.dtype,
    choice: tuple[object, ...],
) -> None:
    (B, D, N), (has_norm, bias, has_residual, activation) = shape, choice
    x = random(B, D, seed=0, dtype=BF16)
    weight = weight_of(2 * N if activation == "swiglu" else N, D, stored, bias=bool(bias))
    norm = InputNorm(1 + 0.3 * random(D, seed=3, dtype=BF16), 1e-5) if has_norm else None
    residual = random(B, N, seed=4, dtype=BF16) if has_residual else None
    expected = naive(x, weight, norm, activation, residual)
    got = function(x, weight, norm=norm, activation=activation, residual=residual)
    assert got.dtype == BF16
    assert got.shape == (B, N)
    # the input is rounded once more with its gain, and squares and gates double an error
    assert error(got, expected) < 2 * limit(BF16)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("stored", STORED)
def test_the_twin_matches_a_loop(stored: torch.dtype, choice: tuple[object, ...]) -> None:
    for shape in SHAPES:
        compare(thin_linear_torch, shape, stored, choice)


@needs_triton
@pytest.mark.parametrize(("shape", "stored", "choice"), every(13, SHAPES, STORED, CHOICES))
def test_the_kernel_matches_a_loop(
    shape: tuple[int, int, int], stored: torch.dtype, choice: tuple[object, ...]
) -> None:
    with kernels(), poisoned():
        compare(thin_linear, shape, stored, choice)


@needs_triton
def test_what_compilers_are_told_of_the_operator_is_true() -> None:
    module = importlib.import_module("pyper.kernels.thin_linear")
    x, gain = random(2, 32, seed=0, dtype=BF16), random(32, seed=1, dtype=BF16)
    weight = weight_of(32, 32, torch.int8, bias=True)
    matrix, residual = (weight.weight, weight.scale, weight.bias), random(2, 32, seed=2, dtype=BF16)
    tickets = torch.zeros(TICKETS, dtype=torch.int32, device=DEVICE)
    plain = (x, *matrix, gain, None, 1e-6, "swiglu", None, None, None, False)
    prepared = (x, *matrix, None, None, 0.0, "", residual, gain, tickets, False)
    with kernels():
        torch.library.opcheck(module._thin_linear_op, plain)
        torch.library.opcheck(module._thin_linear_op, prepared)


def tickets_of() -> Tensor:
    return torch.zeros(TICKETS, dtype=torch.int32, device=DEVICE)


@needs_triton
@pytest.mark.parametrize(
    ("shape", "stored", "choice"),
    every(13, [(2, 300, 17), (5, 64, 70), (64, 520, 130)], STORED, CHOICES),
)
def test_parts_of_the_inputs_add_up(
    shape: tuple[int, int, int], stored: torch.dtype, choice: tuple[object, ...]
) -> None:
    """Some parts are not whole blocks, and the last of three is empty."""
    tickets, cut = tickets_of(), Blocks(64, 128 if shape[1] > 300 else 32, 4, 3, 4)
    with (
        kernels(),
        poisoned(),
        mock.patch.object(thin_blocks, "_blocks", return_value=cut),
    ):
        compare(partial(thin_linear, tickets=tickets), shape, stored, choice)
    assert not tickets.any()


@needs_triton
@pytest.mark.parametrize(
    ("split", "shape", "stored"),
    every(7, [False, True], [(1, 64, 48), (3, 300, 48), (17, 96, 130), (64, 1040, 200)], STORED),
)
def test_a_product_prepares_the_next_ones_norm(
    shape: tuple[int, int, int], stored: torch.dtype, split: bool
) -> None:
    (B, D, N), tickets = shape, tickets_of() if split else None
    x, residual = random(B, D, seed=0, dtype=BF16), random(B, N, seed=4, dtype=BF16)
    first, second = (weight_of(N, size, stored, bias=True) for size in (D, N))
    norm = InputNorm(1 + 0.3 * random(N, seed=3, dtype=BF16), 1e-5)
    with kernels(), poisoned():
        prepared = thin_residual(x, first, residual, norm, tickets=tickets)
        got = thin_linear(prepared, second, norm=norm, activation="gelu", tickets=tickets)
    assert error(prepared.rows, naive(x, first, None, None, residual)) < limit(BF16)
    assert (prepared.scaled is None) == (B == 1 and N % 4 == 0)
    expected = naive(prepared.rows, second, norm, "gelu", None)
    assert error(got, expected) < 2 * limit(BF16)
    assert tickets is None or not tickets.any()


@needs_triton
@pytest.mark.parametrize("stored", every(3, STORED))
def test_a_row_is_the_same_whatever_the_others_are(stored: torch.dtype) -> None:
    x, weight = random(16, 300, seed=0, dtype=BF16), weight_of(70, 300, stored, bias=True)
    residual, norm = random(16, 70, seed=1, dtype=BF16), InputNorm(random(70, dtype=BF16), 1e-5)
    said = []
    with kernels():
        for n in (2, 5, 16):
            rows = thin_residual(x[:n], weight, residual[:n], norm, tickets=tickets_of())
            said.append(thin_linear(rows, weight_of(30, 70, stored, bias=False), norm=norm))
    assert torch.equal(said[0], said[2][:2])
    assert torch.equal(said[1], said[2][:5])


def test_what_no_kernel_prepares_is_normalised_by_who_reads_it() -> None:
    x, residual = random(3, 16, dtype=torch.float64), random(3, 8, dtype=torch.float64)
    first, second = (ThinWeight(random(8, n, seed=n, dtype=torch.float64)) for n in (16, 8))
    norm = InputNorm(random(8, seed=2, dtype=torch.float64), 1e-5)
    rows = thin_residual(x, first, residual, norm)
    got = thin_linear(rows, second, norm=norm)
    expected = thin_linear_torch(x, first, residual=residual)
    assert torch.equal(rows.rows, expected)
    assert torch.equal(got, thin_linear_torch(expected, second, norm=norm))


def test_many_rows_and_wide_types_go_to_the_library() -> None:
    """A result that no kernel has touched is the twin's to the bit."""
    weight = ThinWeight(random(8, 16, seed=1, dtype=torch.float64))
    x = random(3, 16, seed=0, dtype=torch.float64)
    with kernels():
        assert torch.equal(thin_linear(x, weight), thin_linear_torch(x, weight))
    assert DEVICE in str(x.device)
