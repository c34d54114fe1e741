"""Products of 8-bit floats in training."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nn.small_experts import small_config
from pyper.nn import Transformer, init_weights
from pyper.nn.fp8_linear import Fp8Linear, use_fp8


def relative_error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


def random_map(
    rows: int = 64, inner: int = 96, outer: int = 48, bias: bool = False
) -> tuple[Fp8Linear, Tensor, Tensor]:
    """A map, its input and the gradient of its output, in bf16."""
    torch.manual_seed(0)
    linear = nn.Linear(inner, outer, bias=bias, dtype=torch.bfloat16)
    x = torch.randn(4, rows // 4, inner, dtype=torch.bfloat16).requires_grad_()
    grad = 1e-4 * torch.randn(4, rows // 4, outer, dtype=torch.bfloat16)
    return Fp8Linear.of(linear).train(), x, grad


@pytest.mark.parametrize("bias", [False, True])
def test_products_and_gradients_are_near_those_of_float64(bias: bool) -> None:
    linear, x, grad = random_map(bias=bias)
    linear(x).backward(grad)

    wide = x.detach().double().requires_grad_()
    weight = linear.weight.detach().double().requires_grad_()
    offset = None if linear.bias is None else linear.bias.detach().double().requires_grad_()
    out = F.linear(wide, weight, offset)
    out.backward(grad.double())
    assert x.grad is not None
    assert linear.weight.grad is not None
    assert wide.grad is not None
    assert weight.grad is not None
    assert relative_error(linear(x), out) < 0.04
    assert relative_error(x.grad, wide.grad) < 0.08
    assert relative_error(linear.weight.grad, weight.grad) < 0.08
    if linear.bias is not None:
        assert linear.bias.grad is not None
        assert offset is not None
        assert offset.grad is not None
        assert relative_error(linear.bias.grad, offset.grad) < 0.02


def test_numbers_that_eight_bits_hold_are_multiplied_exactly() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(32, 16, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.randint(-8, 9, (16, 32)) / 64)
    x = (torch.randint(-8, 9, (16, 32)) * 4.0).requires_grad_()
    grad = torch.randint(-4, 5, (16, 16)).float() / 1024
    weight = linear.weight.detach().clone()
    map8 = Fp8Linear.of(linear).to(torch.bfloat16).train()
    half = x.detach().bfloat16().requires_grad_()
    out = map8(half)
    out.backward(grad.bfloat16())
    assert half.grad is not None
    assert map8.weight.grad is not None
    assert torch.equal(out, F.linear(x, weight).bfloat16())
    assert torch.equal(half.grad, (grad @ weight).bfloat16())
    assert torch.equal(map8.weight.grad, (grad.T @ x).bfloat16())


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e30])
def test_the_scale_follows_the_largest_value(scale: float) -> None:
    linear, x, _ = random_map()
    expected = F.linear(x.double(), linear.weight.double()) * scale
    got = linear((x * scale).detach())
    assert relative_error(got, expected) < 0.04


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_not_hidden(poison: float) -> None:
    linear, x, _ = random_map()
    with torch.no_grad():
        x[0, 0, 0] = poison
    assert not bool(linear(x).isfinite().all())


def test_evaluation_and_odd_sizes_are_multiplied_as_usual() -> None:
    linear, x, _ = random_map()
    usual = F.linear(x, linear.weight)
    assert not torch.equal(linear(x), usual)
    assert torch.equal(linear.eval()(x), usual)
    odd, short, _ = random_map(rows=60)
    assert torch.equal(odd(short), F.linear(short, odd.weight))


def test_a_model_keeps_its_parameters_and_their_names() -> None:
    model = Transformer(small_config())
    init_weights(model, 0)
    before = dict(model.named_parameters())
    use_fp8(model.blocks)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert type(model.head) is nn.Linear
    exchanged = [n for n, m in model.named_modules() if isinstance(m, Fp8Linear)]
    assert len(exchanged) == 4 * len(model.blocks)
