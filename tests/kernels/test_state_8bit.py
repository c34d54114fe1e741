"""Moments in 8 bits: how near they come, and that they never stand still."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.on_triton import random
from pyper.kernels import Moment
from pyper.kernels.rounding import random_bits, random_key
from pyper.kernels.state_8bit import BLOCK, decode, encode


def spread(n: int, octaves: float, seed: int = 0) -> Tensor:
    """Positive numbers whose logarithms lie evenly over some octaves below 1."""
    generator = torch.Generator().manual_seed(seed)
    return 2.0 ** (-octaves * torch.rand(n, generator=generator))


@pytest.mark.parametrize(("signed", "octaves"), [(True, 10.4), (False, 21.0)])
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e20])
def test_the_relative_error_is_the_same_for_large_and_small(
    signed: bool, octaves: float, scale: float
) -> None:
    x = scale * spread(5000, octaves)
    if signed:
        x[::2] *= -1
    back = decode(*encode(x, signed))
    assert ((back - x).abs() / x.abs()).max() < 0.042


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 700), seed=st.integers(0, 99), signed=st.booleans())
def test_any_length_keeps_the_largest_of_each_block_and_zeros(
    n: int, seed: int, signed: bool
) -> None:
    x = random(n, seed=seed).cpu()
    x = x if signed else x.square()
    x[x.abs() < 0.1] = 0
    codes, largest = encode(x, signed)
    back = decode(codes, largest)
    assert codes.dtype == (torch.int8 if signed else torch.uint8)
    assert len(codes) == n
    for start in range(0, n, BLOCK):
        block, ours = x[start : start + BLOCK], back[start : start + BLOCK]
        at = block.abs().argmax()
        assert ours[at] == block[at]
    if signed:
        assert torch.equal(back == 0, x == 0)
        assert torch.equal(back.sign(), x.sign())


def test_squares_are_never_0_beside_others_so_that_steps_stay_bounded() -> None:
    x = torch.zeros(BLOCK)
    x[0] = 1.0
    back = decode(*encode(x, signed=False))
    assert (back[1:] > 0).all()
    assert back[1:].max() < 2.0**-21
    assert not decode(*encode(torch.zeros(BLOCK), signed=False)).any()


@pytest.mark.parametrize("signed", [True, False])
def test_a_moment_that_fades_slower_than_a_step_of_the_code_fades_all_the_same(
    signed: bool,
) -> None:
    """Rounded to the nearest it would stand still: 0.1 % is far less than half a step."""
    x = torch.full((64 * BLOCK,), 0.5)
    x[::BLOCK] = 1.0  # the largest
    moment = Moment.zeros(x, 8, signed)
    nearest = Moment.zeros(x, 8, signed)
    moment.write(x)
    nearest.write(x)
    for step in range(400):
        key = random_key(0, 0, torch.tensor(float(step)))
        faded = 0.999 * moment.read()
        faded[::BLOCK] = 1.0
        moment.write(faded, random_bits(x, key))
        held = 0.999 * nearest.read()
        held[::BLOCK] = 1.0
        nearest.write(held)
    others = torch.ones(len(x), dtype=torch.bool)
    others[::BLOCK] = False
    assert float(moment.read()[others].mean()) == pytest.approx(0.5 * 0.999**400, rel=0.02)
    assert float(nearest.read()[others].mean()) == pytest.approx(0.5, rel=0.05)


def test_a_quarter_of_the_memory() -> None:
    like = torch.empty(64, 1024)
    small, large = Moment.zeros(like, 8, True), Moment.zeros(like, 32, True)
    assert small.largest is not None
    n_bytes = small.values.nbytes + small.largest.nbytes
    assert n_bytes < 0.26 * large.values.nbytes
