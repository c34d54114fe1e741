"""One row times int8 weights, as whole numbers, against the same in float64."""

from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.hopper import run_for_hopper
from kernels.on_triton import DEVICE, kernels, needs_triton, poisoned, random
from pyper.generate.narrow_weights import quantize_rows
from pyper.kernels import row_linear
from pyper.kernels.row_linear import RowBlocks, linear_of_row

BF16 = torch.bfloat16
SIZES = [(64, 7), (36, 5), (2500, 9), (4096, 3)]
"""D, N."""


def product(x: Tensor, weight: Tensor, scale: Tensor, blocks: RowBlocks | None = None) -> Tensor:
    """(N,) in float32, so that no rounding of the result hides an error of its terms."""
    out = torch.empty(1, len(weight), device=DEVICE)
    shape = blocks or row_linear._blocks(len(weight), weight.shape[1] // 4, weight.dtype)
    quiet = np.errstate(invalid="ignore")  # a GPU does not warn of what is no number
    with kernels(), poisoned(), quiet, mock.patch.object(row_linear, "_blocks", return_value=shape):
        linear_of_row(x[None], weight, scale, None, None, 0.0, "", None, out, False)
    return out[0]


def off(got: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> float:
    """The largest error, as a share of what the terms of a sum amount to."""
    terms = weight.double() * x.double() * scale.double()[:, None]
    size = terms.square().sum(dim=1).sqrt().clamp(min=1e-300)
    return ((got.double() - terms.sum(dim=1)).abs() / size).max().item()


def rows_of(D: int) -> dict[str, Tensor]:
    plain = random(D, seed=1)
    outliers = torch.where(random(D, seed=2) > 2.3, 50.0, 1.0)
    spread = torch.exp(4 * random(D, seed=3))
    rows = {
        "plain": plain,
        "outliers": plain * outliers,
        "one outlier": torch.where(torch.arange(D, device=DEVICE) == 5, 100.0, plain),
        "many sizes": plain * spread,
        "all equal": torch.full((D,), -0.37, device=DEVICE),
        "large": plain * 1e30,
        "small": plain * 1e-24,
    }
    return {name: row.to(BF16) for name, row in rows.items()}


@needs_triton
@pytest.mark.parametrize(("D", "N"), SIZES)
def test_the_sums_are_finer_than_those_of_products_in_bf16(D: int, N: int) -> None:
    weight, scale = quantize_rows(random(N, D, seed=4), "int8")
    for name, x in rows_of(D).items():
        rounded = (weight.double() * x.double()).to(BF16).double().sum(dim=1) * scale
        ours = off(product(x, weight, scale), x, weight, scale)
        assert ours < off(rounded, x, weight, scale), name
        uneven = "outlier" in name or name == "many sizes"
        assert ours < (1e-3 if uneven else 2e-5), name  # bf16's step is 4e-3


@needs_triton
def test_beside_a_very_large_number_the_others_are_off_by_no_more_than_is_promised() -> None:
    weight, scale = quantize_rows(random(20, 2048, seed=4), "int8")
    x = torch.where(torch.arange(2048, device=DEVICE) == 5, 1e4, random(2048, seed=1)).to(BF16)
    exact = (weight.double() * x.double()).sum(dim=1) * scale
    worst = weight[:, :512].double().abs().sum(dim=1) * scale * 1e4 * 2**-15
    assert ((product(x, weight, scale) - exact).abs() < worst).all()
    # What is beside it means the others of its 512 numbers.
    x[5] = 0
    assert off(product(x, weight, scale), x, weight, scale) < 2e-5


@needs_triton
@pytest.mark.parametrize("blocks", [(1, 16, 1), (4, 64, 2), (8, 1024, 8), (16, 256, 4)])
def test_every_block_shape_gives_the_result_of_widened_weights(
    blocks: tuple[int, int, int],
) -> None:
    weight, scale = quantize_rows(random(20, 300, seed=4), "int8")
    x = rows_of(300)["plain"].clamp(min=2**-4, max=2.0)  # nothing to lose: whole numbers are exact
    for widened in (False, True):
        assert off(product(x, weight, scale, RowBlocks(*blocks, widened)), x, weight, scale) < 1e-6


@needs_triton
def test_the_largest_weights_and_numbers_do_not_overflow() -> None:
    weight = torch.full((3, 4096), -128, dtype=torch.int8, device=DEVICE)
    x = torch.full((4096,), -1.9921875, dtype=BF16, device=DEVICE)
    ones = torch.ones(3, device=DEVICE)
    assert torch.equal(product(x, weight, ones), 4096 * 128 * 1.9921875 * ones)


@needs_triton
def test_nothing_gives_exactly_nothing() -> None:
    weight, scale = quantize_rows(random(5, 64, seed=4), "int8")
    weight[2] = 0
    assert not product(torch.zeros(64, dtype=BF16, device=DEVICE), weight, scale).any()
    assert product(rows_of(64)["plain"], weight, scale)[2] == 0


@needs_triton
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(value: float) -> None:
    weight, scale = quantize_rows(random(5, 64, seed=4), "int8")
    x = rows_of(64)["plain"]
    x[17] = value
    assert not product(x, weight, scale).isfinite().any()


BUILD = """
from kernels.hopper import build
from pyper.kernels.row_int8 import _row_times_int8 as kernel

given = dict(N=8192, WORDS=512, ACTIVATION="gelu", HAS_NORM=True, HAS_SCALE=True, HAS_BIAS=False,
             HAS_RESIDUAL=False, BLOCK_N=8, BLOCK_W=512, HARDWARE=True, EARLY=False, EVICTION="",
             OVERLAP=True, bias_ptr=None, residual_ptr=None)
types = {"words_ptr": "*i32", "scale_ptr": "*fp32", "eps": "fp32"}
built = build(kernel, types, given, num_warps=4)
ptx, wait = built.asm["ptx"], built.asm["ptx"].index("griddepcontrol.wait")
assert ptx[:wait].count("ld.global.v4.b32") == 8  # all of the weights, before it waits
assert ptx.count("dp2a") == 8 * 4 * 2
assert ptx.count("redux.sync.add.s32") == 8  # of each output
assert "st.shared" not in ptx[: ptx.rindex("dp2a")]  # nothing is exchanged before the sums
"""


@needs_triton
@pytest.mark.slow
def test_weights_go_from_memory_to_their_products() -> None:
    run_for_hopper(BUILD)
