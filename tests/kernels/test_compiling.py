"""torch.compile takes the kernels in one graph, with nothing read back from the device."""

from collections.abc import Iterator

import pytest
import torch

from kernels.naive_layer import random_weights
from kernels.on_triton import DEVICE, error, kernels, needs_triton, random
from pyper.kernels import (
    activation,
    choice,
    cross_entropy,
    expert_choice_layer,
    linear_cross_entropy,
    router,
    rows,
    slots_of_torch,
)

pytestmark = needs_triton


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_a_layer_and_its_gradients_compile_without_a_break() -> None:
    w = random_weights(12, 8, 10, 3)

    def loss(*parts: torch.Tensor) -> torch.Tensor:
        output = expert_choice_layer(*parts, 4)
        return output.out.square().sum() + output.logits.square().mean()

    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = w.leaves()
        parts = (leaves.x, leaves.residual, leaves.router, leaves.up, leaves.down)
        with kernels():
            value = run(*parts)
            results.append([value, *torch.autograd.grad(value, parts)])
    for eager, compiled in zip(*results, strict=True):
        assert error(compiled, eager) < 1e-6


def test_the_loss_and_its_gradients_compile_without_a_break() -> None:
    given = [random(7, 5).requires_grad_(), random(11, 5, seed=1).requires_grad_()]
    targets = torch.arange(7, device=DEVICE)

    def loss(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(x, weight, targets, chunk_tokens=3) / 7

    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        with kernels():
            value = run(*given)
            results.append([value, *torch.autograd.grad(value, given)])
    for eager, compiled in zip(*results, strict=True):
        assert error(compiled, eager) < 1e-6


def test_what_compilers_are_told_of_the_operators_is_true() -> None:
    """Shapes and types of outputs, and that inputs stay as they are."""
    x, weight, gates = random(9, 8), random(3, 8), random(9, 3)
    index = torch.tensor([[0, 4], [4, 8], [2, 1]], device=DEVICE)
    slots, parts = slots_of_torch(index, 9), random(3, 2, 8)
    calls = [
        (router.router_forward, (x, weight, True)),
        (router.logits_gradient, (gates, gates, gates, True)),
        (router.router_weight_gradient, (gates, x)),
        (choice.invert, (index, 9)),
        (rows.take_rows, (x, index)),
        (rows.sum_rows, (parts, slots, gates, x, gates, weight)),
        (rows.combine_gradients, (x, parts, gates, index)),
        (activation.activation_forward, (parts, "gelu", index, gates)),
        (activation.activation_gradients, (parts, parts, "gelu", index, gates, True)),
        (
            cross_entropy.chunked_cross_entropy,
            (x, weight, torch.arange(9, device=DEVICE) % 3, None, 4, True, True),
        ),
    ]
    with kernels():
        for operator, arguments in calls:
            torch.library.opcheck(operator, arguments)
