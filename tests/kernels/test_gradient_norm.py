"""The norm of many gradients against a sum in float64."""

import pytest
import torch
from torch import Tensor

from kernels.on_triton import DEVICE, kernels, needs_triton, random
from pyper.kernels import TableCache, gradient_norm, gradient_norm_torch

SHAPES = [(3, 700), (8192,), (16, 1024), (5,), (2, 4097), (1,)]
"""Full pieces alone, tails alone, and both."""
BF16, F32 = torch.bfloat16, torch.float32


def weights_and_grads(dtypes: list[torch.dtype]) -> tuple[list[Tensor], list[Tensor]]:
    weights = [random(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    # Sizes that differ by powers of ten from tensor to tensor.
    grads = [
        (10.0 ** (i % 4 - 2) * random(*shape, seed=50 + i)).to(dtypes[i % len(dtypes)])
        for i, shape in enumerate(SHAPES)
    ]
    return weights, grads


def exact(grads: list[Tensor]) -> float:
    return sum(grad.double().square().sum().item() for grad in grads) ** 0.5


@pytest.mark.parametrize("dtypes", [[F32], [BF16], [BF16, F32], [torch.float64]])
def test_the_twin_is_the_norm_of_all_numbers(dtypes: list[torch.dtype]) -> None:
    weights, grads = weights_and_grads(dtypes)
    got = gradient_norm_torch(weights, grads, TableCache())
    assert got.dtype == (torch.float64 if dtypes == [torch.float64] else F32)
    assert got.shape == ()
    assert got.item() == pytest.approx(exact(grads), rel=1e-5)  # torch adds up in float32


@needs_triton
@pytest.mark.parametrize("dtypes", [[F32], [BF16], [BF16, F32]])
def test_the_kernel_is_the_norm_of_all_numbers_time_and_again(dtypes: list[torch.dtype]) -> None:
    tables = TableCache()
    weights, grads = weights_and_grads(dtypes)
    with kernels():
        for scale in (1.0, 3.0, 0.25):
            now = [grad * scale for grad in grads]  # elsewhere in memory
            got = gradient_norm(weights, now, tables)
            assert got.dtype == F32
            assert got.shape == ()
            assert got.item() == pytest.approx(exact(now), rel=1e-6)
            assert torch.equal(got, gradient_norm(weights, now, tables))


@needs_triton
def test_some_gradients_may_be_missing_or_lie_askew() -> None:
    tables = TableCache()
    weights, grads = weights_and_grads([BF16])
    grads[2] = grads[2].repeat(1, 2)[:, : SHAPES[2][1]]
    grads[4] = torch.cat((grads[4].flatten()[:1], grads[4].flatten()))[1:].view_as(grads[4])
    with kernels():
        for kept in ([0, 2, 4], [1, 2], [5]):
            some = [grads[i] for i in kept]
            got = gradient_norm([weights[i] for i in kept], some, tables)
            assert got.item() == pytest.approx(exact(some), rel=1e-6)


@needs_triton
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_shows(bad: float) -> None:
    weights, grads = weights_and_grads([F32])
    grads[2].view(-1)[-1] = bad
    with kernels():
        assert not gradient_norm(weights, grads, TableCache()).isfinite()


@needs_triton
@pytest.mark.skipif(DEVICE != "cuda", reason="there is no GPU")
def test_a_recorded_norm_reads_the_gradients_of_each_replay() -> None:
    tables = TableCache()
    weights, grads = weights_and_grads([BF16])
    gradient_norm(weights, grads, tables)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gradient_norm(weights, grads, tables)
    for grad in grads:
        grad.mul_(2)
    graph.replay()
    assert got.item() == pytest.approx(exact(grads), rel=1e-6)
