"""Casts to 8-bit floats in both layouts, with and without GELU, against plain torch."""

import pytest
import torch
from torch import Tensor

from kernels.narrow_casts import fp8_kernels
from kernels.on_triton import DEVICE, error, needs_triton, poisoned, random
from pyper.kernels import fp8_activation, fp8_cast
from pyper.kernels.fp8_activation import STEEPEST, gradients_to_fp8, hidden_to_fp8
from pyper.kernels.fp8_cast import E4M3, E5M2, Factor, largest_and_norm_of, scales, to_fp8

BF16 = torch.bfloat16
SHAPES = [(16, 32), (144, 80), (272, 144)]


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


def dequantised(x: Factor) -> Tensor:
    return x.rows.float() * x.scale


@needs_triton
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_cast_is_that_of_plain_torch_in_both_layouts(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x = (3e-5 * random(*shape)).to(BF16)
    with fp8_kernels(), poisoned():
        ours = to_fp8(x, dtype)
    plain = to_fp8(x.float(), dtype)
    assert torch.equal(ours.scale, plain.scale)
    assert torch.equal(bits(ours.rows).T, bits(ours.columns))
    assert ours.columns.is_contiguous()
    assert torch.equal(bits(ours.rows), bits(plain.rows))
    assert error(dequantised(ours), x) < (0.03 if dtype == E4M3 else 0.06)


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
@pytest.mark.parametrize("shape", [(16_384, 8192), (2048, 6144), (16_400, 2064)])
def test_large_tensors_are_cast_and_measured_on_a_gpu(shape: tuple[int, int]) -> None:
    x = random(*shape).to(BF16)
    ours, (largest, norm) = to_fp8(x, E4M3), largest_and_norm_of(x)
    rows, columns = fp8_cast.cast_both_torch(x, 1 / ours.scale, E4M3)
    assert torch.equal(bits(ours.rows), bits(rows))
    assert torch.equal(bits(ours.columns), bits(columns))
    assert largest == x.abs().max()
    assert error(norm, x.float().norm(dim=1).amax()) < 1e-5


@needs_triton
@pytest.mark.parametrize("shape", [*SHAPES, (1, 8), (5, 4112)])
def test_largest_values_and_norms_are_found(shape: tuple[int, int]) -> None:
    x = random(*shape).to(BF16)
    with fp8_kernels(), poisoned():
        largest, norm = largest_and_norm_of(x)
    assert largest == x.abs().max()
    assert error(norm, x.double().norm(dim=1).amax()) < 1e-5


@needs_triton
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e30])
@pytest.mark.parametrize("by_kernel", [False, True])
def test_norms_have_a_bound_where_squares_leave_the_range(size: float, by_kernel: bool) -> None:
    x = (size * random(32, 48)).to(BF16)
    expected = float(x.double().norm(dim=1).amax())
    if by_kernel:
        with fp8_kernels():
            norm = float(largest_and_norm_of(x)[1])
    else:
        norm = float(largest_and_norm_of(x)[1])
    assert expected * (1 - 1e-6) <= norm <= 7 * expected


@needs_triton
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("by_kernel", [False, True])
def test_what_is_no_number_makes_the_scale_none(poison: float, by_kernel: bool) -> None:
    x = random(32, 48).to(BF16)
    x[17, 31] = poison
    if by_kernel:
        with fp8_kernels():
            factor, norm = to_fp8(x, E4M3), largest_and_norm_of(x)[1]
    else:
        factor, norm = to_fp8(x, E4M3), largest_and_norm_of(x)[1]
    assert factor.scale.isnan()
    assert scales(norm, E4M3)[1].isnan()


@needs_triton
@pytest.mark.parametrize("activation", fp8_activation.ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_hidden_rows_and_gradients_are_those_of_plain_torch(
    shape: tuple[int, int], activation: str
) -> None:
    pre, dhidden = (2 * random(*shape)).to(BF16), random(*shape, seed=1).to(BF16)
    inverse, hidden_inverse = torch.tensor(1024.0).to(DEVICE), torch.tensor(32.0).to(DEVICE)
    with fp8_kernels(), poisoned():
        hidden = hidden_to_fp8(pre, hidden_inverse, activation)
        ours = gradients_to_fp8(dhidden, pre, inverse, hidden_inverse, activation)
    plain = hidden_to_fp8(pre, hidden_inverse, activation)
    theirs = gradients_to_fp8(dhidden, pre, inverse, hidden_inverse, activation)
    assert torch.equal(bits(hidden).T, bits(ours[2]))
    assert torch.equal(bits(ours[0]).T, bits(ours[1]))
    for mine, other in zip((hidden, *ours), (plain, *theirs), strict=True):
        assert mine.dtype == other.dtype
        # GELU of the kernel is its own, so that a few numbers round the other way.
        assert error(mine.float(), other.float()) < 2e-3


@pytest.mark.parametrize("activation", fp8_activation.ACTIVATIONS)
def test_activations_stay_below_what_bounds_rest_on(activation: str) -> None:
    z = torch.linspace(-40, 40, 100_001, dtype=torch.float64).requires_grad_()
    value = fp8_activation._activated(z, activation)
    value.sum().backward()
    assert z.grad is not None
    assert bool((value.abs() <= z.abs()).all())
    assert float(z.grad.abs().max()) < STEEPEST


@needs_triton
def test_what_compilers_are_told_of_the_operators_is_true() -> None:
    x, one = random(32, 48).to(BF16), torch.ones((), device=DEVICE)
    calls = [
        (fp8_cast.measure, (x, True)),
        (fp8_cast.measure, (x, False)),
        (fp8_cast.cast_both, (x, one, E5M2)),
        (fp8_activation.hidden_forward, (x, one, "gelu")),
        (fp8_activation.hidden_gradients, (x, x, one, one, "gelu")),
    ]
    with fp8_kernels():
        for operator, arguments in calls:
            torch.library.opcheck(operator, arguments)
