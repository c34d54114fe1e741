"""The trials of GELU inside the products: right where they can run, and built for a large GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.gluon_emulated import Pointer, Tiles, emulated, run
from kernels.on_triton import error, kernels, limit, needs_triton, poisoned, random, random_index

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BF16 = torch.bfloat16


def shapes() -> dict[str, Tensor]:
    """Two experts, two tiles of rows each and three of columns; D is no power of two."""
    E, C, D, d_ff = 2, 32, 48, 96
    return {
        "rows": random(E, C, D, seed=0, dtype=BF16),
        "up": random(E, d_ff, D, seed=1, dtype=BF16) / D**0.5,
        "down": random(E, D, d_ff, seed=2, dtype=BF16) / D**0.5,
        "gates": random(40, E, seed=3).softmax(-1),
        "index": random_index(40, E, C),
    }


@needs_triton
def test_the_simple_trial_matches_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _fused_products as trial

    tile = trial.Tile(16, 32, 4, 2, depth=16)
    given = shapes()
    rows, up, down, gates, index = given.values()
    with kernels(), poisoned():
        got_pre, hidden = trial.up_gelu(rows, up, gates, index, tile)
        dpre, dgates = trial.down_gradient_gelu(rows, down, got_pre, gates, index, tile)

    matches((got_pre, hidden, dpre, dgates), rows, rows, up, down, gates, index)


def matches(
    got: tuple[Tensor, ...],
    rows: Tensor,
    dy: Tensor,
    up: Tensor,
    down: Tensor,
    gates: Tensor,
    index: Tensor,
) -> None:
    """pre, hidden, dpre and the gates' gradients, against float64."""
    pre, hidden, dpre, dgates = got
    gate = gates.double().T.gather(1, index).unsqueeze(-1)
    x = pre.double().requires_grad_()
    value = torch.nn.functional.gelu(x)
    dhidden = dy.double() @ down.double()
    (value * gate * dhidden).sum().backward()
    assert error(pre, rows.double() @ up.double().mT) < limit(BF16)
    assert error(hidden, value * gate) < limit(BF16)
    assert error(dpre, x.grad) < limit(BF16)
    assert error(dgates, (dhidden * value).sum(-1)) < limit(BF16)


@pytest.mark.parametrize("slices", [4, 8])
@pytest.mark.parametrize(("rolled", "mode"), [(False, "exact"), (True, "exact"), (True, "tanh")])
def test_the_overlapped_trial_matches_float64(slices: int, rolled: bool, mode: str) -> None:
    """Five programs share eight tiles: some have two, some one."""
    trial = emulated(BENCHMARKS / "_overlapped_products.py")
    (E, C, D, d_ff), stages = (2, 256, 1024, 512), 3
    rows, dy, up, down, gates, index = overlapped_inputs(E, C, D, d_ff)
    constants = {"E": E, "D": D, "F": d_ff, "STAGES": stages, "GROUP": 8}
    constants |= {"SLICES": slices, "ROLLED": rolled, "MODE": mode}
    pre, hidden, dpre = (torch.full((E * C, d_ff), float("nan"), dtype=BF16) for _ in range(3))
    parts = torch.full((d_ff // 256, E, C), float("nan"))
    words = [Tiles(x.view(torch.int32), (64, 128 // slices)) for x in (pre, hidden, dpre)]
    around = (Pointer(parts), Pointer(gates), Pointer(index), C)

    tiles = (Tiles(rows.flatten(0, 1), (64, 64)), Tiles(up.flatten(0, 1), (256, 64)))
    run(trial["_product"], 5, *tiles, *words[:2], *around, BACKWARD=False, **constants)
    tiles = (Tiles(dy.flatten(0, 1), (64, 64)), Tiles(down.flatten(0, 1), (64, 256)))
    given = (*tiles, words[0], words[2], *around)
    run(trial["_product"], 5, *given, BACKWARD=True, **constants)

    got = (pre.view(E, C, d_ff), hidden.view(E, C, d_ff), dpre.view(E, C, d_ff), parts.sum(0))
    matches(got, rows, dy, up, down, gates, index)


def overlapped_inputs(E: int, C: int, D: int, d_ff: int) -> tuple[Tensor, ...]:
    rows, dy = (random(E, C, D, seed=seed, dtype=BF16) for seed in (0, 1))
    up = random(E, d_ff, D, seed=2, dtype=BF16) / D**0.5
    down = random(E, D, d_ff, seed=3, dtype=BF16) / D**0.5
    return rows, dy, up, down, random(300, E, seed=4).softmax(-1), random_index(300, E, C)


BUILD = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
import _overlapped_products as trial

def build(plan, b_shape, backward):
    tiles, words = trial._TILE_LAYOUT, trial._shared(128 // plan.slices)
    kernel = trial._product
    constants = dict(E=8, D=2048, F=8192, BACKWARD=backward, **plan.constants)
    def described(kind, shape, layout):
        return f"tensordesc<{kind}[{shape[0]}, {shape[1]}],{layout!r}>"
    types = {"a_tiles": described("bf16", (64, 64), tiles), "C": "i32",
             "b_tiles": described("bf16", b_shape, tiles), "index_ptr": "*i64"}
    out = described("i32", (64, 128 // plan.slices), words)
    names = kernel.arg_names
    default = {n: out if n.endswith("tiles") else "*fp32" for n in names}
    signature = {n: "constexpr" if n in constants else types.get(n, default[n]) for n in names}
    places = [i for i, n in enumerate(names) if "ptr" in n or n == "C"]
    aligned = {(i,): [["tt.divisibility", 16]] for i in places}
    source = GluonASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})

for b_shape, backward in (((256, 64), False), ((64, 256), True)):
    built = build(trial.PLANS[1], b_shape, backward)
    assert built.metadata.shared <= 227 * 1024
    for part in ("wgmma.mma_async", "cp.async.bulk.tensor", "setmaxnreg"):
        assert part in built.asm["ptx"], part
"""


@needs_triton
@pytest.mark.slow
def test_the_overlapped_trial_builds_for_a_large_gpu() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(BENCHMARKS)}
    subprocess.run([sys.executable, "-c", BUILD], check=True, env=environment)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there it measures")
def test_without_a_gpu_the_comparison_says_that_there_is_nothing_to_do() -> None:
    command = [sys.executable, str(BENCHMARKS / "fused_products.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "nothing to do" in printed
