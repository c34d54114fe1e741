"""Compiled kernels at real shapes, against float64 on the same GPU."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.naive_layer import Weights, random_weights
from kernels.on_triton import error, leaf, limit, needs_triton, random
from pyper.kernels import (
    Choice,
    activate_rows,
    combine_rows_torch,
    expert_choice_layer,
    expert_feed_forward_torch,
    gather_rows_torch,
    linear_cross_entropy,
    router_gates,
    router_gates_torch,
)

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    needs_triton,
]


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def reference(w: Weights, choice: Choice) -> Tensor:
    """The layer in float64 for a choice that was made."""
    _, gates = router_gates_torch(w.x, w.router)
    rows = gather_rows_torch(w.x, choice.token_index, choice.slots)
    y = expert_feed_forward_torch(rows, choice.token_index, gates, w.up, w.down)
    return combine_rows_torch(y, choice.token_index, choice.slots, None, w.residual)


def step(w: Weights, capacity: int, dout: Tensor) -> tuple[Tensor, Choice, list[Tensor]]:
    given = (w.x, w.residual, w.router, w.up, w.down)
    output = expert_choice_layer(*given, capacity)
    return output.out, output.choice, list(torch.autograd.grad(output.out, given, dout))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("N", "D", "d_ff", "E", "factor"),
    [
        (8192, 1024, 2048, 8, 1),
        (8192, 1024, 2048, 8, 2),
        (4096, 512, 1024, 64, 1),
        (5003, 1000, 1500, 7, 1),
        (4096, 2100, 333, 1, 1),
    ],
)
def test_the_layer_at_real_shapes(
    N: int, D: int, d_ff: int, E: int, factor: int, dtype: torch.dtype
) -> None:
    w = random_weights(N, D, d_ff, E, dtype=dtype).leaves()
    capacity, dout = factor * N // E, random(N, D, seed=8, dtype=dtype)
    out, choice, grads = step(w, capacity, dout)
    exact = w.leaves(torch.float64)
    expected = reference(exact, choice)
    inputs = (exact.x, exact.residual, exact.router, exact.up, exact.down)
    expected_grads = torch.autograd.grad(expected, inputs, dout.double())

    scores = router_gates_torch(exact.x, exact.router)[1].detach()
    best = scores.topk(capacity, dim=0).values.sum(dim=0)
    taken = scores.gather(0, choice.token_index.T).sum(dim=0)
    assert torch.allclose(taken, best, rtol=1e-6)  # near-ties may go either way
    assert error(out, expected) < 2 * limit(dtype)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        # one expert's softmax gate is always 1: its router learns nothing
        assert error(ours, theirs) < 2 * limit(dtype) or theirs.norm() < 1e-6


def test_the_layers_bits_do_not_change_from_run_to_run() -> None:
    w = random_weights(8192, 512, 1024, 8, dtype=torch.bfloat16).leaves()
    dout = random(8192, 512, seed=8, dtype=torch.bfloat16)
    first_out, _, first = step(w, 2048, dout)
    for _ in range(5):
        out, _, grads = step(w, 2048, dout)
        assert torch.equal(out, first_out)
        for a, b in zip(grads, first, strict=True):
            assert torch.equal(a, b)


def test_the_host_never_waits_for_the_device() -> None:
    w = random_weights(1024, 256, 512, 8, dtype=torch.bfloat16).leaves()
    head = leaf(random(1000, 256, dtype=torch.bfloat16))
    targets = torch.arange(1024, device="cuda") % 1000
    with no_waiting():
        step(w, 128, torch.ones_like(w.x))
        torch.autograd.grad(linear_cross_entropy(w.x, head, targets, None, 256), (w.x, head))


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match")
def test_a_cuda_graph_replays_layer_and_loss_on_new_inputs() -> None:
    w = random_weights(2048, 256, 512, 8, dtype=torch.bfloat16).leaves()
    head = leaf(random(1000, 256, dtype=torch.bfloat16) / 16)
    targets = torch.arange(2048, device="cuda") % 1000
    given = (w.x, w.residual, w.router, w.up, w.down, head)

    def run() -> list[Tensor]:
        out = expert_choice_layer(*given[:5], 256).out
        loss = linear_cross_entropy(out, head, targets, None, 512)
        return [loss, *torch.autograd.grad(loss, given)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run()
    with torch.no_grad():
        w.x.copy_(random(2048, 256, seed=77, dtype=torch.bfloat16))
    graph.replay()
    for ours, theirs in zip(recorded, run(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("V", [32_768, 50_257, 151_936])
def test_the_loss_at_real_vocabularies(V: int, dtype: torch.dtype) -> None:
    x = random(700, 512, dtype=dtype)
    head = (random(V, 512, seed=1) / 16).to(dtype)
    targets = torch.arange(700, device="cuda") * (V // 700)
    weights = random(700, seed=2).abs()
    ours, exact = [leaf(x), leaf(head)], [leaf(x, torch.float64), leaf(head, torch.float64)]
    loss = linear_cross_entropy(*ours, targets, weights, 256)
    losses = F.cross_entropy(F.linear(*exact), targets, reduction="none")
    expected = (losses * weights.double()).sum()
    assert error(loss, expected) < (1e-3 if dtype == torch.bfloat16 else 1e-6)
    grads = torch.autograd.grad(loss, ours)
    for a, b in zip(grads, torch.autograd.grad(expected, exact), strict=True):
        assert error(a, b) < (1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("E", [1, 8, 64])
def test_router_logits_are_float32_from_bf16_tokens(E: int) -> None:
    x, weight = random(32_768, 2048, dtype=torch.bfloat16), random(E, 2048, seed=1) / 45
    logits, gates = router_gates(x, weight)
    exact = x.double() @ weight.double().T
    assert error(logits, exact) < 5e-6
    assert error(gates, exact.softmax(dim=-1)) < 5e-6


def test_gelu_is_torchs_to_its_last_bits() -> None:
    pre = 3 * random(2, 512, 8192)
    exact = leaf(pre, torch.float64)
    ours = leaf(pre)
    out = activate_rows(ours, "gelu")
    expected = F.gelu(exact)
    assert (out - expected).abs().max() < 2e-6
    out.sum().backward()
    expected.sum().backward()
    assert (ours.grad - exact.grad).abs().max() < 2e-6
