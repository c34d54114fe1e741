"""A dense feed-forward as one function against products and activation one by one."""

from collections.abc import Iterator
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from kernels.on_triton import DEVICE, error, kernels, leaf, limit, needs_triton, random
from pyper.config import ExpertConfig
from pyper.config.expert import Activation
from pyper.kernels import dense_feed_forward, dense_feed_forward_torch
from pyper.nn.feed_forward import FeedForward
from pyper.nn.fp8_linear import use_fp8

ACTIVATIONS = get_args(Activation)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def given(
    kind: Activation, dtype: torch.dtype = torch.float32, biases: bool = True
) -> list[Tensor]:
    """x (2, 3, D), up, down, and their biases; D = 12, F = 21."""
    width = 42 if kind == "swiglu" else 21
    parts = [random(2, 3, 12), random(width, 12, seed=1) / 2, random(12, 21, seed=2) / 4]
    if biases:
        parts += [random(width, seed=3), random(12, seed=4)]
    return [part.to(dtype) for part in parts]


def run(function: object, kind: Activation, parts: list[Tensor]) -> list[Tensor]:
    """The result and the gradients of everything that was given."""
    leaves = [leaf(part) for part in parts]
    out = function(*leaves[:3], kind, *leaves[3:])  # type: ignore[operator]
    out.backward(random(2, 3, 12, seed=5).to(out.dtype))
    return [out, *(part.grad for part in leaves)]  # type: ignore[list-item]


@needs_triton
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_value_and_gradients_are_those_of_the_parts(
    kind: Activation, dtype: torch.dtype, biases: bool
) -> None:
    parts = given(kind, dtype, biases)
    with kernels():
        ours = run(dense_feed_forward, kind, parts)
    exact = run(dense_feed_forward_torch, kind, [part.double() for part in parts])
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.dtype == dtype
        assert error(mine, theirs) < 2 * limit(dtype)


@needs_triton
def test_it_compiles_without_a_break() -> None:
    compiled = torch.compile(dense_feed_forward, fullgraph=True, backend="aot_eager")
    with kernels():
        eager, graphs = (run(f, "gelu", given("gelu")) for f in (dense_feed_forward, compiled))
    for mine, theirs in zip(graphs, eager, strict=True):
        assert error(mine, theirs) < 1e-6


@needs_triton
def test_rows_of_f_numbers_are_kept_once() -> None:
    parts, kept = [leaf(part) for part in given("gelu")], []

    def keep(x: Tensor) -> Tensor:
        kept.append(tuple(x.shape))
        return x

    with kernels(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        dense_feed_forward(*parts[:3], "gelu", *parts[3:])
    assert kept.count((6, 21)) == 1


@needs_triton
def test_frozen_parts_have_no_gradient() -> None:
    x, up, down = given("gelu", biases=False)
    x = leaf(x)
    with kernels():
        dense_feed_forward(x, up, down).sum().backward()
    reference = leaf(x)
    dense_feed_forward_torch(reference, up, down).sum().backward()
    assert error(x.grad, reference.grad) < 1e-6


def layer() -> FeedForward:
    config = ExpertConfig(
        vocab_size=8, seq_len=4, bos_id=0, d_model=16, n_layers=1, n_heads=2, d_ff=32
    )
    return FeedForward(config).to(DEVICE)


@needs_triton
def test_the_module_uses_it_in_training_of_plain_maps_alone() -> None:
    x, training, evaluation = random(2, 4, 16), layer().train(), layer().eval()
    narrow = nn.ModuleList([layer()])
    use_fp8(narrow)
    with kernels():
        assert training.runs_as_one(x)
        assert not training.runs_as_one(x.double())
        assert not evaluation.runs_as_one(x)
        assert not narrow[0].runs_as_one(x)


@needs_triton
def test_the_module_gives_the_same_on_kernels() -> None:
    module, x = layer().train(), random(2, 4, 16)
    usual = module(x)
    with kernels():
        assert error(module(x), usual) < 1e-6


def test_the_twin_is_what_the_module_does_to_the_bit() -> None:
    module, x = layer().eval(), random(2, 4, 16)
    assert torch.equal(dense_feed_forward_torch(x, module.up.weight, module.down.weight), module(x))
