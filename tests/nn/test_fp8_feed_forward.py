"""A feed-forward of 8-bit products as one function, and the bounds that its scales rest on."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels.narrow_casts import fp8_kernels
from kernels.on_triton import DEVICE, error, leaf, needs_triton, random
from pyper.config import ExpertConfig
from pyper.config.expert import Activation
from pyper.kernels import dense_feed_forward_torch
from pyper.kernels.fp8_products import fp8_feed_forward, fp8_linear
from pyper.nn.feed_forward import FeedForward
from pyper.nn.fp8_linear import use_fp8

BF16 = torch.bfloat16
N, D, F = 64, 48, 96


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def parts(grown: float = 1.0, outlier: float = 1.0) -> list[Tensor]:
    """x (N, D) with unit rows as of a norm, up and down as initialised, times `grown`.

    One channel of x is `outlier` times as large, one row of `up` and one column of `down` as well.
    """
    x, up, down = random(N, D), 0.02 * random(F, D, seed=1), 0.02 * random(D, F, seed=2)
    x[:, 3] *= outlier
    up[5] *= outlier
    down[:, 7] *= outlier
    x = x / x.square().mean(dim=1, keepdim=True).sqrt()
    return [x.to(BF16), (grown * up).to(BF16), (grown * down).to(BF16)]


def run(function: object, given: list[Tensor], *settings: object) -> list[Tensor]:
    """The result and the gradients of everything that was given."""
    leaves = [leaf(part) for part in given]
    out = function(*leaves, *settings)  # type: ignore[operator]
    out.backward(1e-4 * random(*out.shape, seed=5).to(out.dtype))
    return [out, *(part.grad for part in leaves)]  # type: ignore[list-item]


def two_products(x: Tensor, up: Tensor, down: Tensor, activation: str) -> Tensor:
    """Each with scales from the largest values themselves."""
    form = "tanh" if activation == "gelu_tanh" else "none"
    return fp8_linear(torch.nn.functional.gelu(fp8_linear(x, up), approximate=form), down)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("grown", [1.0, 5.0, 50.0])
@pytest.mark.parametrize("outlier", [1.0, 10.0, 30.0])
def test_scales_from_bounds_are_as_good_as_those_of_largest_values(
    activation: Activation, grown: float, outlier: float
) -> None:
    given = parts(grown, outlier)
    exact = run(dense_feed_forward_torch, [x.double() for x in given], activation)
    bounded = run(fp8_feed_forward, given, activation)
    measured = run(two_products, given, activation)
    for ours, usual, right in zip(bounded, measured, exact, strict=True):
        assert ours.dtype == BF16
        assert error(ours, right) < 0.13
        assert error(ours, right) < 1.1 * error(usual, right) + 2e-3


@needs_triton
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_kernels_do_what_plain_torch_does(activation: Activation) -> None:
    plain = run(fp8_feed_forward, parts(), activation)
    with fp8_kernels():
        ours = run(fp8_feed_forward, parts(), activation)
    for mine, theirs in zip(ours, plain, strict=True):
        assert error(mine, theirs) < 8e-3


@needs_triton
def test_it_compiles_without_a_break() -> None:
    compiled = torch.compile(fp8_feed_forward, fullgraph=True, backend="aot_eager")
    with fp8_kernels():
        eager, graphs = (run(f, parts(), "gelu") for f in (fp8_feed_forward, compiled))
    for mine, theirs in zip(graphs, eager, strict=True):
        assert torch.equal(mine, theirs)


def test_rows_of_f_numbers_are_kept_once() -> None:
    kept: list[tuple[int, ...]] = []

    def keep(x: Tensor) -> Tensor:
        kept.append((*x.shape, x.element_size()))
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        fp8_feed_forward(*(leaf(part) for part in parts()), "gelu")
    assert kept.count((N, F, 2)) == 1
    assert sum(shape[:-1] in ((N, F), (F, N)) for shape in kept) == 1
    assert (D, N, 1) in kept


def test_frozen_parts_have_no_gradient() -> None:
    given = parts()
    x = leaf(given[0])
    fp8_feed_forward(x, *given[1:], "gelu").sum().backward()
    whole = [leaf(part) for part in given]
    fp8_feed_forward(*whole, "gelu").sum().backward()
    assert x.grad is not None
    assert whole[0].grad is not None
    assert torch.equal(x.grad, whole[0].grad)


@pytest.mark.parametrize("poisoned", range(3))
def test_a_number_that_is_none_is_not_hidden(poisoned: int) -> None:
    given = parts()
    given[poisoned][1, 2] = torch.nan
    out, *gradients = run(fp8_feed_forward, given, "gelu")
    assert not bool(out.isfinite().all())
    assert not any(bool(gradient.isfinite().all()) for gradient in gradients[:1])


def test_a_gradient_that_is_none_is_not_hidden() -> None:
    leaves = [leaf(part) for part in parts()]
    out = fp8_feed_forward(*leaves, "gelu")
    out.backward(torch.full_like(out, torch.inf))
    assert not any(bool(x.grad.isfinite().all()) for x in leaves if x.grad is not None)


def layer(activation: Activation, bias: bool = False) -> FeedForward:
    config = ExpertConfig(
        vocab_size=8,
        seq_len=4,
        bos_id=0,
        d_model=D,
        n_layers=1,
        n_heads=2,
        d_ff=F,
        activation=activation,
        feed_forward_bias=bias,
    )
    module = FeedForward(config).to(DEVICE, BF16)
    use_fp8(torch.nn.ModuleList([module]))
    return module


def test_the_module_uses_it_where_activation_and_sizes_allow() -> None:
    x = random(4, 16, D).to(BF16)
    assert layer("gelu").runs_as_one_in_fp8(x)
    assert not layer("gelu").runs_as_one_in_fp8(x[:, :15])
    assert not layer("gelu").eval().runs_as_one_in_fp8(x)
    assert not layer("gelu", bias=True).runs_as_one_in_fp8(x)
    assert not layer("swiglu").runs_as_one_in_fp8(x)


@pytest.mark.parametrize("activation", ["gelu", "swiglu", "relu2"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_module_is_near_its_twin_in_evaluation(activation: Activation, bias: bool) -> None:
    module, x = layer(activation, bias), random(4, 16, D).to(BF16)
    assert error(module(x), module.eval()(x)) < 0.1
