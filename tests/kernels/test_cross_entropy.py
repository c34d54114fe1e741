"""The head's loss in chunks against the definition, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.on_triton import DEVICE, error, kernels, leaf, needs_triton, random
from pyper.kernels import cross_entropy, linear_cross_entropy, linear_cross_entropy_torch

DTYPES = [torch.float32, torch.bfloat16]


def naive(x: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor | None) -> Tensor:
    """−log of the target's share, token by token."""
    total = x.new_zeros(())
    for n, target in enumerate(targets.tolist()):
        exp = (weight @ x[n]).exp()
        loss = -(exp[target] / exp.sum()).log()
        total = total + (loss if token_weights is None else token_weights[n] * loss)
    return total


def compare(
    shape: tuple[int, int, int],
    chunk: int | None,
    weighted: bool,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> None:
    N, D, V = shape
    x, weight = random(N, D, seed=seed, dtype=dtype), random(V, D, seed=seed + 1, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(V, (N,), generator=generator).to(DEVICE)
    token_weights = random(N, seed=seed + 2).abs() if weighted else None
    ours, reference = [leaf(x), leaf(weight)], [leaf(t, torch.float64) for t in (x, weight)]
    with kernels():
        loss = linear_cross_entropy(*ours, targets, token_weights, chunk)
        (loss / 3).backward()
    expected = naive(*reference, targets, token_weights)
    (expected / 3).backward()

    assert loss.dtype == torch.float32
    rounding = 5e-6 if dtype == torch.float32 else 2e-2  # logits keep 8 bits in bf16
    assert error(loss, expected) < rounding
    for mine, theirs in zip(ours, reference, strict=True):
        assert error(mine.grad, theirs.grad) < 2 * rounding


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunk", [None, 3, 1])
def test_the_loss_and_its_gradients(chunk: int | None, weighted: bool, dtype: torch.dtype) -> None:
    compare((10, 6, 37), chunk, weighted, dtype)


@needs_triton
@settings(max_examples=8, deadline=None)
@given(
    N=st.integers(1, 9),
    D=st.integers(1, 12),
    V=st.integers(2, 70),
    chunk=st.integers(1, 10),
    weighted=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_shape_will_do(
    N: int, D: int, V: int, chunk: int, weighted: bool, dtype: torch.dtype, seed: int
) -> None:
    compare((N, D, V), chunk, weighted, dtype, seed)


@needs_triton
def test_a_vocabulary_longer_than_a_block() -> None:
    compare((3, 4, 5003), None, False)


@needs_triton
def test_a_maximum_after_the_first_block_rescales_what_came_before() -> None:
    x, targets = torch.ones(1, 1, device=DEVICE), torch.tensor([7], device=DEVICE)
    weight = torch.linspace(0, 9, 5003, device=DEVICE).unsqueeze(1)
    with kernels():
        loss = linear_cross_entropy(x, weight, targets)
    assert error(loss, linear_cross_entropy_torch(x.double(), weight.double(), targets)) < 1e-6


@needs_triton
def test_one_side_alone_can_want_a_gradient() -> None:
    x, weight, targets = random(6, 4), random(9, 4, seed=1), torch.arange(6, device=DEVICE)
    both = [leaf(x), leaf(weight)]
    linear_cross_entropy_torch(*both, targets).backward()
    for frozen in (0, 1):
        given = [leaf(x), leaf(weight)]
        given[frozen].requires_grad_(False)
        with kernels():
            linear_cross_entropy(*given, targets).backward()
        assert given[frozen].grad is None
        assert error(given[1 - frozen].grad, both[1 - frozen].grad) < 1e-6


@needs_triton
def test_strides_do_not_matter() -> None:
    x, weight, weights = random(6, 4), random(9, 4, seed=1), random(6, 2).abs()
    targets = torch.arange(12, device=DEVICE).view(6, 2)[:, 0] % 9
    strided = (x.T.contiguous().T, weight.T.contiguous().T, targets, weights[:, 1])
    with kernels():
        loss = linear_cross_entropy(*strided, 4)
    assert error(loss, linear_cross_entropy_torch(x, weight, targets, weights[:, 1])) < 1e-6


@needs_triton
def test_without_gradients_the_loss_is_the_same() -> None:
    x, weight, targets = random(6, 4), random(9, 4, seed=1), torch.arange(6, device=DEVICE)
    with kernels(), torch.no_grad():
        loss = linear_cross_entropy(x, weight, targets, chunk_tokens=4)
    assert error(loss, linear_cross_entropy_torch(x, weight, targets)) < 1e-6


@needs_triton
def test_logits_in_the_hundreds_do_not_overflow() -> None:
    x, weight = 100 * random(4, 3), random(11, 3, seed=1)
    targets = torch.arange(4, device=DEVICE)
    with kernels():
        loss = linear_cross_entropy(x, weight, targets)
    assert error(loss, linear_cross_entropy_torch(x.double(), weight.double(), targets)) < 1e-5


@needs_triton
@pytest.mark.parametrize("target", [-1, 9])
def test_a_target_outside_the_vocabulary_makes_the_loss_nan(target: int) -> None:
    targets = torch.tensor([0, target], device=DEVICE)
    with kernels():
        assert linear_cross_entropy(random(2, 4), random(9, 4), targets).isnan()


@needs_triton
def test_gradients_of_logits_are_written_over_all_of_them() -> None:
    logits, targets = random(5, 21), torch.arange(5, device=DEVICE)
    expected = logits.softmax(dim=1) - torch.nn.functional.one_hot(targets, 21)
    losses = torch.full((5,), torch.nan, device=DEVICE)
    cross_entropy._losses_and_gradient(logits, targets, None, losses, True)
    assert error(logits, expected) < 1e-6
    assert losses.isfinite().all()


@needs_triton
def test_sums_over_chunks_are_not_rounded_to_bf16() -> None:
    """Each token alone in a chunk: beside 512, bf16 would lose every 0.5."""
    x = torch.ones(9, 1, dtype=torch.bfloat16, device=DEVICE)
    weight = leaf(torch.zeros(2, 1, dtype=torch.bfloat16, device=DEVICE))
    targets = torch.zeros(9, dtype=torch.int64, device=DEVICE)
    token_weights = torch.tensor([1024.0] + 8 * [1.0], device=DEVICE)
    with kernels():
        linear_cross_entropy(x, weight, targets, token_weights, 1).backward()
    assert weight.grad.flatten().tolist() == [-516.0, 516.0]


@pytest.mark.parametrize("weighted", [False, True])
def test_the_twin_is_the_definition_and_so_is_its_gradient(weighted: bool) -> None:
    x, weight = random(5, 4).double(), random(7, 4, seed=1).double()
    targets = torch.arange(5, device=DEVICE)
    token_weights = random(5).double() if weighted else None
    loss = linear_cross_entropy_torch(x, weight, targets, token_weights)
    assert error(loss, naive(x, weight, targets, token_weights)) < 1e-12
    assert torch.autograd.gradcheck(
        lambda *a: linear_cross_entropy_torch(*a, targets, token_weights), (leaf(x), leaf(weight))
    )
