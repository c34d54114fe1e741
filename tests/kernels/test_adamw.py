"""One-pass AdamW and Muon's passes: against float64, torch's own, and their twins."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.on_triton import DEVICE, error, kernels, needs_triton, random
from pyper.kernels import (
    AdamWSettings,
    AdamWTensors,
    Moment,
    TableCache,
    adamw_step,
    adamw_step_torch,
    add_updates,
    add_updates_torch,
    join_weight,
    nesterov,
    nesterov_torch,
    split_weight,
)

SHAPES = [(3, 700), (2048,), (4096,), (5,), (16, 257)]
"""Full pieces alone, tails alone, and both."""
DECAYS = [0.1, 0.0, 0.1, 0.0, 0.3]
FORMATS = ["float32", "split", "stochastic"]
STEPS = {"twin": 50, "kernel": 50 if DEVICE == "cuda" else 8}
SETTINGS = AdamWSettings(beta1=0.9, beta2=0.95, eps=1e-8, random_seed=7)


def new_tensors(
    kind: str, bits: int, shapes: Sequence[tuple[int, ...]] = SHAPES
) -> list[AdamWTensors]:
    """Random weights in one of the three formats, and fresh moments."""
    found = []
    for i, shape in enumerate(shapes):
        weight, low = random(*shape, seed=i), None
        if kind != "float32":
            weight, low = split_weight(weight)
        found.append(
            AdamWTensors(
                weight=weight,
                low=low if kind == "split" else None,
                mean=Moment.zeros(weight, bits, signed=True),
                square=Moment.zeros(weight, bits, signed=False),
                weight_decay=DECAYS[i],
                number=i,
            )
        )
    return found


def grads_of(step: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Of sizes that differ by powers of ten within a tensor, and from step to step."""
    found = []
    for i, shape in enumerate(SHAPES):
        sizes = 10 ** random(*shape, seed=100 + i)
        found.append((sizes * random(*shape, seed=1000 * step + i)).to(dtype))
    return found


def scalar(value: float) -> Tensor:
    return torch.tensor(value, device=DEVICE)


def exact(t: AdamWTensors) -> Tensor:
    return t.weight if t.low is None else join_weight(t.weight, t.low)


def run(
    tensors: list[AdamWTensors], n_steps: int, on: str, dtype: torch.dtype = torch.float32
) -> list[AdamWTensors]:
    """Train in place with rates and factors that change from step to step."""
    steps = torch.zeros(len(tensors), device=DEVICE)
    tables = TableCache()
    for step in range(n_steps):
        given = (scalar(1e-2 / (1 + step)), scalar(0.5 + step), SETTINGS, tables)
        if on == "twin":
            adamw_step_torch(tensors, grads_of(step, dtype), steps, *given)
        else:
            with kernels():
                adamw_step(tensors, grads_of(step, dtype), steps, *given)
    assert steps.tolist() == [n_steps] * len(tensors)
    return tensors


def naive(weights: list[Tensor], n_steps: int) -> list[Tensor]:
    """AdamW by definition (arXiv:1711.05101, algorithm 2), in float64, of the same run."""
    weights = [w.double() for w in weights]
    means, squares = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for step in range(n_steps):
        lr = 1e-2 / (1 + step)
        for i, grad in enumerate(grads_of(step)):
            g = grad.double() * (0.5 + step)
            means[i] = 0.9 * means[i] + 0.1 * g
            squares[i] = 0.95 * squares[i] + 0.05 * g * g
            mean = means[i] / (1 - 0.9 ** (step + 1))
            square = squares[i] / (1 - 0.95 ** (step + 1))
            weights[i] -= lr * (mean / (square.sqrt() + 1e-8) + DECAYS[i] * weights[i])
    return weights


@pytest.mark.parametrize("kind", ["float32", "split"])
@pytest.mark.parametrize("on", ["twin", pytest.param("kernel", marks=needs_triton)])
def test_many_steps_are_adamw_in_float64_but_for_rounding(kind: str, on: str) -> None:
    tensors, n = new_tensors(kind, 32), STEPS[on]
    expected = naive([exact(t) for t in tensors], n)
    for t, reference in zip(run(tensors, n, on), expected, strict=True):
        assert error(exact(t), reference) < 1e-6


@pytest.mark.parametrize("on", ["twin", pytest.param("kernel", marks=needs_triton)])
def test_split_weights_are_the_float32_weights_to_the_bit(on: str) -> None:
    split = run(new_tensors("split", 32), STEPS[on], on)
    whole = run(new_tensors("float32", 32), STEPS[on], on)
    for ours, master in zip(split, whole, strict=True):
        assert torch.equal(exact(ours), master.weight)
        assert torch.equal(ours.mean.values, master.mean.values)
        # and what the model computes with is the nearest bf16
        assert (ours.weight.float() - master.weight).abs().max() < 2**-8 * master.weight.abs().max()


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("kind", FORMATS)
def test_the_kernel_is_its_twin(kind: str, bits: int, dtype: torch.dtype) -> None:
    """Codes and roundings at random too: both draw the same bits. A last bit may fall elsewhere."""
    ours = run(new_tensors(kind, bits), 3, "kernel", dtype)
    twins = run(new_tensors(kind, bits), 3, "twin", dtype)
    for t, twin in zip(ours, twins, strict=True):
        close = (exact(t) - exact(twin)).abs() <= 1e-6 * exact(twin).abs() + 1e-7
        assert close.float().mean() > 0.995
        for moment, other in ((t.mean, twin.mean), (t.square, twin.square)):
            difference = (moment.values.float() - other.values.float()).abs()
            limit = 1e-5 * other.values.float().abs() if bits == 32 else 0
            assert (difference <= limit).float().mean() > 0.99
            assert (difference <= limit + 1).float().mean() > 0.999


@needs_triton
def test_tensors_without_a_gradient_stay_as_they_are() -> None:
    tensors, others = new_tensors("split", 32), new_tensors("split", 32)
    steps = torch.zeros(len(tensors), device=DEVICE)
    chosen, tables = [1, 4], TableCache()
    with kernels():
        for step in range(2):
            given = [tensors[i] for i in chosen], [grads_of(step)[i] for i in chosen]
            adamw_step(*given, steps, scalar(0.1), scalar(1.0), SETTINGS, tables)
    assert steps.tolist() == [0, 2, 0, 0, 2]
    for i, (t, before) in enumerate(zip(tensors, others, strict=True)):
        assert torch.equal(exact(t), exact(before)) is (i not in chosen)


@needs_triton
def test_gradients_may_differ_in_type_and_lie_anywhere() -> None:
    ours, twins = new_tensors("split", 32), new_tensors("split", 32)
    grads = grads_of(0, torch.bfloat16)
    grads[0] = grads[0].float().mT.contiguous().mT  # other strides
    grads[1] = torch.cat((grads[1][:1], grads[1]))[1:]  # two bytes off
    given = (scalar(0.1), scalar(1.0), SETTINGS, TableCache())
    with kernels():
        adamw_step(ours, grads, torch.zeros(5, device=DEVICE), *given)
    adamw_step_torch(twins, [g.clone() for g in grads], torch.zeros(5, device=DEVICE), *given)
    for t, twin in zip(ours, twins, strict=True):
        assert error(exact(t), exact(twin)) < 1e-6


def train_quadratic(kind: str, bits: int, rate: float, n_steps: int = 400) -> float:
    """Mean distance of 4096 weights from the minimum of a noisy, badly scaled bowl."""
    [t] = new_tensors(kind, bits, [(4096,)])
    steps, tables = torch.zeros(1, device=DEVICE), TableCache()
    curvature = 10 ** (0.5 * random(4096, seed=50))
    for step in range(n_steps):
        noise = random(4096, seed=step) * 0.1
        grad = curvature * (exact(t).float() - 1 + noise)
        decay = min(1.0, 2 * (1 - step / n_steps))
        adamw_step([t], [grad], steps, scalar(rate * decay), scalar(1.0), SETTINGS, tables)
    return float((exact(t).float() - 1).abs().mean())


def test_moments_of_8_bits_and_random_rounding_lead_to_the_same_minimum() -> None:
    reference = train_quadratic("float32", 32, 0.03)
    assert reference < 0.02
    assert train_quadratic("split", 32, 0.03) == pytest.approx(reference, rel=1e-3)
    assert train_quadratic("split", 8, 0.03) < 1.1 * reference + 1e-3
    # bf16 itself is as coarse as 0.004 near 1
    assert train_quadratic("stochastic", 8, 0.03) < reference + 0.004


@pytest.mark.parametrize("on", ["twin", pytest.param("kernel", marks=needs_triton)])
def test_roundings_are_the_same_in_every_run_and_others_with_every_seed(on: str) -> None:
    def once(seed: int) -> list[Tensor]:
        settings = AdamWSettings(0.9, 0.95, 1e-8, seed)
        tensors = new_tensors("stochastic", 8)
        for step in range(3):
            with kernels():
                function: Any = adamw_step if on == "kernel" else adamw_step_torch
                steps = torch.full((5,), float(step), device=DEVICE)
                grads = grads_of(step)
                function(tensors, grads, steps, scalar(0.1), scalar(1.0), settings, TableCache())
        return [x for t in tensors for x in (t.weight, t.mean.values, t.square.values)]

    first, again, other = once(1), once(1), once(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True) if len(a) > 5)


# --- Muon's passes ---------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nesterov_is_its_definition_and_its_twin(bits: int, dtype: torch.dtype) -> None:
    shapes = [(3, 700), (16, 256)]
    ours, twins = ([Moment.zeros(random(*s), bits, signed=True) for s in shapes] for _ in range(2))
    reference = [torch.zeros(*s, dtype=torch.float64, device=DEVICE) for s in shapes]
    tables = TableCache()
    for step in range(4):
        grads = [random(*s, seed=10 * step + i, dtype=dtype) for i, s in enumerate(shapes)]
        given = ([0, 1], scalar(float(step)), scalar(0.5), 0.95, torch.float32, 3, tables)
        with kernels():
            directions = nesterov(ours, grads, *given)
        expected = nesterov_torch(twins, [g.clone() for g in grads], *given)
        for i, grad in enumerate(grads):
            g = 0.5 * grad.double()
            reference[i] = 0.95 * reference[i] + 0.05 * g
            naive_direction = 0.05 * g + 0.95 * reference[i]
            assert error(directions[i], naive_direction) < (1e-6 if bits == 32 else 0.05)
            assert error(directions[i], expected[i]) < (1e-6 if bits == 32 else 5e-3)
            assert error(ours[i].read(), reference[i]) < (1e-6 if bits == 32 else 0.06)


@needs_triton
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_are_added_and_weights_decay(kind: str, dtype: torch.dtype) -> None:
    shapes = [(3, 700), (16, 256)]
    ours, twins = new_tensors(kind, 32, shapes), new_tensors(kind, 32, shapes)
    expected = [exact(t).double() for t in ours]
    updates = [random(*s, seed=5 + i, dtype=dtype) for i, s in enumerate(shapes)]
    for tensors, function in ((ours, add_updates), (twins, add_updates_torch)):
        with kernels():
            function(
                [t.weight for t in tensors],
                [t.low for t in tensors],
                updates,
                [0, 1],
                scalar(1.0),
                scalar(0.1),
                0.5,
                -2.0,
                3,
                TableCache(),
            )
    for t, twin, start, update in zip(ours, twins, expected, updates, strict=True):
        reference = start * (1 - 0.1 * 0.5) - 0.1 * 2.0 * update.double()
        assert error(exact(t), reference) < (5e-3 if kind == "stochastic" else 1e-6)
        assert error(exact(t), exact(twin)) < (1e-3 if kind == "stochastic" else 1e-6)
