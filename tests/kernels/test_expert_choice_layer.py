"""The whole layer, forward and backward, against loops over tokens and experts in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.naive_layer import Weights, chosen, naive_layer, random_weights
from kernels.on_triton import error, kernels, limit, needs_triton, random
from pyper.kernels import ExpertChoiceOutput, expert_choice_layer, expert_choice_layer_torch


def run(layer: Any, w: Weights, capacity: int, **options: Any) -> ExpertChoiceOutput:
    return layer(
        *(w.x, w.residual, w.router, w.up, w.down, capacity),
        up_bias=w.up_bias,
        down_bias=w.down_bias,
        **options,
    )


def objective(out: torch.Tensor, logits: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Something that pulls at all three, as balancing losses do."""
    pull = random(*out.shape, seed=9).to(out.dtype)
    return (out * pull).sum().to(logits.dtype) + (logits**2).mean() + (gates**2).sum()


def compare(
    w: Weights,
    capacity: int,
    layer: Any = expert_choice_layer,
    *,
    gate: str = "softmax",
    activation: str = "gelu",
    recompute: bool = False,
    padding: torch.Tensor | None = None,
) -> None:
    dtype = w.x.dtype
    ours, reference = w.leaves(), w.leaves(torch.float64)
    options = {"gate": gate, "activation": activation, "recompute": recompute, "padding": padding}
    with kernels():
        output = run(layer, ours, capacity, **options)
        objective(output.out, output.logits, output.gates).backward()

    scores = (w.x.double() @ w.router.double().T).detach()
    scores = scores.softmax(dim=1) if gate == "softmax" else scores
    if padding is not None:
        scores = scores.masked_fill(padding[:, None], -torch.inf)
    index = chosen(scores, capacity)
    expected = naive_layer(reference, index, gate, activation)
    objective(*expected).backward()

    assert [sorted(row) for row in output.choice.token_index.tolist()] == [*map(sorted, index)]
    assert output.out.dtype == dtype
    assert error(output.out, expected[0]) < 2 * limit(dtype)
    assert error(output.logits, expected[1]) < 5e-6
    assert error(output.gates, expected[2]) < 5e-6
    for name, part in ours.named().items():
        assert error(part.grad, getattr(reference, name).grad) < 3 * limit(dtype), name


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["gelu", "relu2", "swiglu"])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_the_kernels_give_output_and_all_gradients(
    gate: str, activation: str, dtype: torch.dtype
) -> None:
    w = random_weights(12, 20, 24, 3, dtype=dtype, swiglu=activation == "swiglu")
    compare(w, 5, gate=gate, activation=activation)


@needs_triton
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_biases_a_residual_and_recomputation_may_come_and_go(
    residual: bool, biases: bool, recompute: bool
) -> None:
    w = random_weights(10, 9, 11, 4, residual=residual, biases=biases)
    compare(w, 4, recompute=recompute)


@needs_triton
@settings(max_examples=6, deadline=None)
@given(
    N=st.integers(1, 9),
    D=st.integers(1, 20),
    F=st.integers(1, 20),
    E=st.integers(1, 16),
    share=st.floats(0.05, 1),
    gate=st.sampled_from(["softmax", "sigmoid"]),
    seed=st.integers(0, 99),
)
def test_any_shape_will_do(
    N: int, D: int, F: int, E: int, share: float, gate: str, seed: int
) -> None:
    if gate == "softmax" and E == 1:
        E = 2  # its gates would all be 1, and any choice as good as another
    compare(random_weights(N, D, F, E, seed=seed), max(1, int(share * N)), gate=gate)


@needs_triton
def test_padding_takes_no_part() -> None:
    w = random_weights(10, 8, 12, 3)
    padding = torch.arange(10, device=w.x.device) >= 7
    compare(w, 3, padding=padding)


@needs_triton
def test_two_passes_give_the_same_bits() -> None:
    w = random_weights(40, 24, 16, 8, dtype=torch.bfloat16)
    passes = []
    for _ in range(2):
        leaves = w.leaves()
        with kernels():
            output = run(expert_choice_layer, leaves, 10)
            output.out.float().square().sum().backward()
        passes.append([output.out, *(p.grad for p in leaves.named().values())])
    for first, second in zip(*passes, strict=True):
        assert torch.equal(first, second)


@needs_triton
def test_frozen_experts_get_no_gradient_and_disturb_none() -> None:
    w = random_weights(8, 6, 10, 3)
    free, frozen = w.leaves(), w.leaves()
    frozen.up.requires_grad_(False)
    frozen.down.requires_grad_(False)
    with kernels():
        for leaves in (free, frozen):
            run(expert_choice_layer, leaves, 3).out.square().sum().backward()
    assert frozen.up.grad is None
    assert torch.equal(frozen.x.grad, free.x.grad)
    assert torch.equal(frozen.router.grad, free.router.grad)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("biases", [False, True])
def test_the_twin_is_the_loop_and_so_are_its_gradients(biases: bool, gate: str) -> None:
    w = random_weights(8, 5, 6, 3, biases=biases)
    compare(w, 3, expert_choice_layer_torch, gate=gate)


def test_the_twins_gradient_is_that_of_its_value() -> None:
    w = random_weights(6, 3, 4, 2).leaves(torch.float64)

    def outputs(*parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = expert_choice_layer_torch(*parts, 2)
        return output.out, output.logits, output.gates

    assert torch.autograd.gradcheck(outputs, (w.x, w.residual, w.router, w.up, w.down))
