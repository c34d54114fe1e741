"""The residual stream and its norm in one pass, against their definition."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.on_triton import (
    DEVICE,
    compare_compiled,
    error,
    kernels,
    leaf,
    limit,
    needs_triton,
    poisoned,
    random,
)
from pyper.kernels import add_norm, add_norm_torch, norm_alone, rms_norm
from pyper.nn.norm import RMSNorm

EPS = 1e-3


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def naive(x: Tensor, out: Tensor | None, gain: Tensor) -> tuple[Tensor, Tensor]:
    y = x if out is None else x + out
    return y, torch.stack([gain * row / (row.square().mean() + EPS).sqrt() for row in y])


def compare(
    function: Any, N: int, D: int, dtype: torch.dtype = torch.float32, *, adds: bool = True
) -> None:
    """Values and gradients against `naive` in float64."""
    parts = [random(N, D, dtype=dtype), random(D, seed=1, dtype=dtype)]
    parts += [random(N, D, seed=2, dtype=dtype)] if adds else []
    leaves, exact = [leaf(p) for p in parts], [leaf(p, torch.float64) for p in parts]
    got = function(leaves[0] * 1, leaves[2] if adds else None, leaves[1], EPS)
    expected = naive(exact[0] * 1, exact[2] if adds else None, exact[1])
    pulls = [random(N, D, seed=3 + i, dtype=dtype) for i in range(2)]
    torch.autograd.backward(got, pulls)
    torch.autograd.backward(expected, [pull.double() for pull in pulls])
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == dtype
        assert error(mine, theirs) < limit(dtype)
    for mine, theirs in zip(leaves, exact, strict=True):
        assert error(mine.grad, theirs.grad) < 2 * limit(dtype)


@pytest.mark.parametrize("adds", [True, False])
def test_the_twin_is_the_definition(adds: bool) -> None:
    compare(add_norm_torch, 5, 12, adds=adds)


@needs_triton
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 12), (7, 600), (3, 4100)])
def test_the_kernels_are_the_definition(
    shape: tuple[int, int], dtype: torch.dtype, adds: bool
) -> None:
    with kernels(), poisoned():
        compare(add_norm, *shape, dtype, adds=adds)


@needs_triton
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("shape", [(3, 1, 4), (3, 5, 12), (2, 300, 8)])
def test_rows_of_several_experts_have_gains_of_their_own(
    shape: tuple[int, int, int], adds: bool
) -> None:
    E, _, D = shape
    given = [random(*shape), random(E, D, seed=1), random(*shape, seed=2)]
    ours, single = [leaf(part) for part in given], [leaf(part) for part in given]
    pulls = [random(*shape, seed=3 + i) for i in range(2)]
    with kernels(), poisoned():
        got = add_norm(ours[0] * 1, ours[2] if adds else None, ours[1], EPS)
        torch.autograd.backward(got, pulls)
    for e in range(E):
        parts = [part[e] for part in single]
        expected = add_norm_torch(parts[0], parts[2] if adds else None, parts[1], EPS)
        torch.autograd.backward(expected, [pull[e] for pull in pulls])
        for mine, theirs in zip(got, expected, strict=True):
            assert error(mine[e], theirs) < 1e-6
    for mine, theirs in zip(ours, single, strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        assert mine.grad is None or error(mine.grad, theirs.grad) < 1e-5


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_alone_is_the_second_of_both(dtype: torch.dtype) -> None:
    x, gain, pull = (random(*shape, dtype=dtype) for shape in ((2, 5, 12), (12,), (2, 5, 12)))
    ours, exact = [leaf(x), leaf(gain)], [leaf(x, torch.float64), leaf(gain, torch.float64)]
    with kernels(), poisoned():
        got = norm_alone(*ours, EPS)
        got.backward(pull)
    expected = add_norm_torch(exact[0], None, exact[1], EPS)[1]
    expected.backward(pull.double())
    assert error(got, expected) < limit(dtype)
    for mine, theirs in zip(ours, exact, strict=True):
        assert error(mine.grad, theirs.grad) < 2 * limit(dtype)


@needs_triton
def test_modules_use_it_in_training_where_no_compiler_looks() -> None:
    norm, x = RMSNorm(12, EPS).to(DEVICE).train(), random(5, 12)
    usual = norm(x)
    with kernels():
        assert norm.runs_as_one(x)
        assert error(norm(x), usual) < 1e-6
        for part, same in zip(norm.add(x, x), (2 * x, norm(2 * x)), strict=True):
            assert error(part, same) < 1e-6
        assert not norm.eval().runs_as_one(x)
        assert error(norm(x), usual) < 1e-6


@needs_triton
def test_more_rows_than_partial_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rms_norm, "_PARTS", 4)
    with kernels(), poisoned():
        compare(add_norm, 11, 8)


@needs_triton
@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4099, 2048), (1025, 4096), (515, 8192)])
def test_large_shapes_on_a_gpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    compare(add_norm, *shape, dtype)


@needs_triton
@pytest.mark.parametrize("adds", [True, False])
def test_it_compiles_without_a_break(adds: bool) -> None:
    given = [random(2, 3, 12), random(12, seed=1), random(2, 3, 12, seed=2)]

    def loss(x: Tensor, gain: Tensor, out: Tensor) -> Tensor:
        y, normed = add_norm(x, out if adds else None, gain, EPS)
        return (y + normed.sigmoid() + out).square().sum()

    compare_compiled(loss, given)


@needs_triton
def test_what_compilers_are_told_of_the_operators_is_true() -> None:
    x, gain, out = random(5, 12), random(12, seed=1), random(5, 12, seed=2)
    with kernels():
        torch.library.opcheck(rms_norm.add_norm_forward, (x, None, gain, EPS))
        torch.library.opcheck(rms_norm.add_norm_forward, (x, out, gain, EPS))
        scale = rms_norm.add_norm_forward(x, out, gain, EPS)[2]
        torch.library.opcheck(rms_norm.add_norm_gradient, (out, x, x, scale, gain))
        torch.library.opcheck(rms_norm.add_norm_gradient, (out, None, x, scale, gain))
