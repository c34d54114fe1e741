"""float32 weights as bf16 and 16 more bits, and bf16 weights rounded at random."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.on_triton import DEVICE, kernels, needs_triton
from pyper.kernels import TableCache, add_updates, join_weight, split_weight
from pyper.kernels.rounding import (
    more_bits,
    random_bits,
    random_key,
    round_stochastically,
    store_masters,
    to_masters,
)

ON = ["twin", pytest.param("kernel", marks=needs_triton)]


def every_edge() -> Tensor:
    """All upper halves with the lower ones that matter: zeros, subnormals, ties, inf, NaN …"""
    high = torch.arange(2**16, dtype=torch.int32) << 16
    lows = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    return (high[:, None] | lows).flatten().to(DEVICE).view(torch.float32)


def split(x: Tensor, on: str) -> tuple[Tensor, Tensor]:
    """By the twin; by the kernel as an update of bf16 weights by numbers and a decay of 1."""
    if on == "twin":
        return split_weight(x)
    weight = torch.zeros_like(x, dtype=torch.bfloat16)
    low = torch.zeros_like(x, dtype=torch.int16)
    one = torch.ones((), device=DEVICE)
    with kernels(), np.errstate(invalid="ignore"):  # as for `over`: a GPU does not warn
        add_updates([weight], [low], [x], [0], one, one, 1.0, 1.0, 0, TableCache())
    return weight, low


@pytest.mark.parametrize("on", ON)
def test_every_float32_comes_back_bit_for_bit(on: str) -> None:
    x = every_edge()
    weight, low = split(x, on)
    back = join_weight(weight, low)

    finite = ~x.isnan() & (x != 0)  # 0 · 1 + −0 is 0 in any arithmetic
    assert torch.equal(back.view(torch.int32)[finite], x.view(torch.int32)[finite])
    assert torch.equal(back[~x.isnan()], x[~x.isnan()])
    assert weight[x.isnan()].isnan().all()
    assert back[x.isnan()].isnan().all()


def test_many_at_once_are_split_and_joined_as_one() -> None:
    x = every_edge()
    x = x[~x.isnan()]
    weight, low = split_weight(x)
    ours, rest = torch.empty_like(weight), torch.empty_like(low)
    store_masters([x.clone(), x[:1].clone()], [ours, ours[:1].clone()], [rest, rest[:1]], never)
    assert torch.equal(ours.view(torch.int16), weight.view(torch.int16))
    assert torch.equal(rest, low)
    masters = to_masters([ours, x, ours], [rest, None, None])
    assert torch.equal(masters[0].view(torch.int32), x.view(torch.int32))
    assert masters[1] is x
    assert torch.equal(masters[2], ours.float())


def test_the_nans_of_arithmetic_stay_nan() -> None:
    x = torch.cat((torch.tensor([torch.inf]) - torch.inf, torch.tensor([torch.nan])))
    x = torch.cat((x, torch.tensor([2**31 - 1], dtype=torch.int32).view(torch.float32)))
    ours, rest = torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int16)
    store_masters([x], [ours], [rest], never)
    assert ours.isnan().all()
    assert join_weight(ours, rest).isnan().all()


def never(i: int) -> Tensor:
    raise AssertionError("nothing here is rounded at random")


def test_zeros_keep_their_sign() -> None:
    x = torch.tensor([0.0, -0.0])
    assert torch.equal(join_weight(*split_weight(x)).signbit(), x.signbit())


@pytest.mark.parametrize("on", ON)
def test_the_weight_is_the_nearest_bf16_and_ties_go_away_from_zero(on: str) -> None:
    x = every_edge()
    x = x[x.isfinite() & (x.abs() < 3e38)]
    weight, _ = split(x, on)
    nearest = x.to(torch.bfloat16)  # ties to even
    ties = (x.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(weight[~ties], nearest[~ties])
    assert (weight[ties].float().abs() > x[ties].abs()).all()


def test_rounding_at_random_keeps_the_mean_and_what_bf16_holds() -> None:
    x = torch.linspace(0.1, 0.9, 9)
    means = torch.zeros(9)
    rounds = 4000
    for step in range(rounds):
        key = random_key(0, 0, torch.tensor(float(step)))
        rounded = round_stochastically(x, random_bits(x, key)).float()
        assert ((rounded - x).abs() < 2**-7 * x).all()
        means += rounded / rounds
    spacing = 2.0 ** (x.log2().floor() - 7)
    assert ((means - x).abs() < 4 * 0.5 * spacing / rounds**0.5).all()
    exact = x.bfloat16().float()
    assert torch.equal(round_stochastically(exact, random_bits(x, key)).float(), exact)


def test_rounding_at_random_leaves_inf_and_nan() -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan])
    rounded = round_stochastically(x, torch.full((3,), 0xFFFF))
    assert rounded[0] == torch.inf
    assert rounded[1] == -torch.inf
    assert rounded[2].isnan()


def test_random_bits_are_even_and_independent_of_place_step_tensor_and_seed() -> None:
    like = torch.empty(2**14)

    def bits(seed: int, number: int, step: int) -> Tensor:
        return random_bits(like, random_key(seed, number, torch.tensor(float(step))))

    first = bits(0, 0, 0)
    streams = [first, bits(1, 0, 0), bits(0, 1, 0), bits(0, 0, 1), more_bits(first), first.roll(1)]
    halves = [half for s in streams for half in (s & 0xFFFF, s >> 16)]
    uniform = torch.stack([h.double() / 2**16 for h in halves]) - 0.5
    assert uniform.mean(dim=1).abs().max() < 4 * 12**-0.5 / 2**7
    correlation = torch.corrcoef(uniform) - torch.eye(len(halves))
    assert correlation.abs().max() < 4.5 / 2**7
    counts = torch.stack([((first >> bit) & 1).double().mean() for bit in range(32)])
    assert (counts - 0.5).abs().max() < 4.5 * 0.5 / 2**7
