"""The router against its definition, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.on_triton import error, kernels, leaf, limit, needs_triton, poisoned, random
from pyper.kernels import router, router_gates, router_gates_torch

DTYPES = [torch.float32, torch.bfloat16]


def naive(x: Tensor, weight: Tensor, gate: str) -> tuple[Tensor, Tensor]:
    """Token by token."""
    logits = torch.stack([torch.stack([(w * row).sum() for w in weight]) for row in x])
    exp = (logits - logits.amax(dim=1, keepdim=True)).exp()
    gates = exp / exp.sum(dim=1, keepdim=True) if gate == "softmax" else 1 / (1 + (-logits).exp())
    return logits, gates


def compare(N: int, D: int, E: int, gate: str, dtype: torch.dtype, seed: int = 0) -> None:
    x, weight = random(N, D, seed=seed, dtype=dtype), random(E, D, seed=seed + 1) * D**-0.5
    ours, reference = [leaf(x), leaf(weight)], [leaf(x, torch.float64), leaf(weight, torch.float64)]
    pull = [random(N, E, seed=seed + 2), random(N, E, seed=seed + 3)]
    with kernels():
        out = router_gates(*ours, gate)
        torch.autograd.backward(out, pull)
    expected = naive(*reference, gate)
    torch.autograd.backward(expected, [p.double() for p in pull])

    assert [t.dtype for t in out] == [torch.float32, torch.float32]
    # float32 whatever x is: here rounding would change which expert runs
    assert error(out[0], expected[0]) < 5e-6
    assert error(out[1], expected[1]) < 5e-6
    assert error(ours[0].grad, reference[0].grad) < limit(dtype)
    assert error(ours[1].grad, reference[1].grad) < 5e-6


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("N", "D", "E"), [(1, 1, 1), (70, 33, 5), (129, 160, 8), (20, 16, 64)])
def test_the_kernel_gives_logits_gates_and_gradients(
    N: int, D: int, E: int, gate: str, dtype: torch.dtype
) -> None:
    compare(N, D, E, gate, dtype)


@needs_triton
@settings(max_examples=8, deadline=None)
@given(
    N=st.integers(1, 90),
    D=st.integers(1, 150),
    E=st.integers(1, 64),
    gate=st.sampled_from(["softmax", "sigmoid"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_shape_will_do(
    N: int, D: int, E: int, gate: str, dtype: torch.dtype, seed: int
) -> None:
    compare(N, D, E, gate, dtype, seed)


@needs_triton
def test_every_logit_and_gate_is_written() -> None:
    x, weight = random(67, 40), random(5, 40)
    with poisoned():
        logits, gates = router.router_forward(x, weight, True)
        gradient = router.logits_gradient(logits, gates, gates, True)
        dweight = router.router_weight_gradient(gradient, x)
    for out in (logits, gates, gradient, dweight):
        assert out.isfinite().all()


@needs_triton
def test_bf16_tokens_meet_all_24_bits_of_the_weight() -> None:
    """A weight rounded to bf16 once would be off by 2e-3."""
    x, weight = random(64, 256, dtype=torch.bfloat16), random(8, 256, seed=1)
    with kernels():
        logits, _ = router_gates(x, weight)
    assert error(logits, x.double() @ weight.double().T) < 3e-6


@needs_triton
def test_large_logits_do_not_overflow() -> None:
    x, weight = 100 * random(16, 32), random(4, 32, seed=1)
    for gate in ("softmax", "sigmoid"):
        with kernels():
            logits, gates = router_gates(x, weight, gate)
        assert logits.abs().max() > 100
        assert error(gates, naive(x.double(), weight.double(), gate)[1]) < 1e-4


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_the_twins_gradient_is_that_of_its_value(gate: str) -> None:
    x, weight = leaf(random(6, 5).double()), leaf(random(3, 5, seed=1).double())
    assert torch.autograd.gradcheck(lambda *a: router_gates_torch(*a, gate), (x, weight))
