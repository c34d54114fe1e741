"""The linear map of few rows: its blocks, and what becomes of them on a large GPU."""

import itertools

import pytest
import torch

from kernels.hopper import run_for_hopper
from kernels.on_triton import needs_triton
from kernels.test_thin_linear import BF16, STORED
from pyper.kernels import thin_blocks


@pytest.mark.parametrize("n_rows", [2, 16, 32, 64])
def test_blocks_fill_memory_and_processors(n_rows: int) -> None:
    for N, D, splits in ((6144, 2048, 1), (2048, 2048, 4), (8192, 2048, 1), (2048, 8192, 4)):
        weight = torch.empty(N, D, dtype=BF16, device="meta")
        assert thin_blocks._blocks(weight, n_rows, "gelu", False) == (64, 128, splits, 5, 4)
        for alone, stored in itertools.product((False, True), STORED):
            blocks = thin_blocks._blocks(weight.to(stored), n_rows, "swiglu", alone)
            row_bytes = 2 * blocks.outputs * stored.itemsize + max(n_rows, 16) * 2
            assert blocks.stages >= 3
            assert blocks.stages * blocks.inputs * row_bytes <= thin_blocks.SHARED_BYTES


BUILD = """
import importlib
import triton
from kernels.hopper import build, spilled_bytes
from pyper.kernels.thin_blocks import SHARED_BYTES

def built_of(kernel, stored, scaled, stages=4, **constants):
    constants = dict(N=8192, ACTIVATION="gelu", HAS_NORM=True, HAS_SCALE=scaled,
                     HAS_BIAS=False, HAS_RESIDUAL=False, OVERLAP=True) | constants
    absent = {"bias_ptr": None, "residual_ptr": None} | ({} if scaled else {"scale_ptr": None})
    constants |= absent
    types = {"weight_ptr": stored, "words_ptr": "*i32", "scale_ptr": "*fp32"}
    types |= {"B": "i32", "eps": "fp32", "squares_ptr": "*fp32", "next_squares_ptr": "*fp32"}
    types |= {"part_ptr": "*fp32", "tickets_ptr": "*i32"}
    return build(kernel, types, constants, num_warps=4, num_stages=stages)

few = importlib.import_module("pyper.kernels.thin_linear_kernel").thin_linear_block
one = importlib.import_module("pyper.kernels.row_linear")._linear_of_row
none = ("squares_ptr", "next_gain_ptr", "next_ptr", "next_squares_ptr", "part_ptr", "tickets_ptr")
few_blocks = dict(D=2048, BLOCK_B=16, BLOCK_N=32, BLOCK_D=256, LINES=16, N_SPLITS=1, N_SQUARES=0)
few_blocks |= dict(HAS_NEXT=False) | {name: None for name in none}
# Bytes that a thread puts aside where registers are short: none, but for what is known of Triton
# 3.9, which works out the address of every step of a product apart and keeps them all.
version = ".".join(triton.__version__.split(".")[:2])
known_spills = {("3.9", "*bf16", "swiglu"): 192}
one_block = dict(BLOCK_N=4, BLOCK_W=512, EARLY=False, EVICTION="")
for stored, scaled, name, words in (
    ("*bf16", False, "bf16", 1024), ("*i8", True, "int8", 512), ("*fp8e4nv", True, "fp8", 512)
):
    ptx = built_of(few, stored, scaled, **few_blocks).asm["ptx"]
    assert "cp.async" in ptx, stored  # weights are on their way while others are used
    assert "mma.sync" in ptx or "wgmma" in ptx, stored
    assert ptx.index("prefetch.global.L2") < ptx.index("griddepcontrol.wait"), stored
    many = dict(few_blocks, BLOCK_B=64, BLOCK_N=64, BLOCK_D=128, N_SPLITS=4, gain_ptr=None)
    stages = 5 if stored == "*bf16" else 3
    for used, given in (
        ("squares_ptr", dict(N_SQUARES=32)),
        ("squares_ptr", dict(N_SQUARES=32, ACTIVATION="swiglu", N_SPLITS=2)),
        ("next_ptr", dict(HAS_NORM=False)),
    ):
        here = {k: v for k, v in many.items() if k not in (used, "part_ptr", "tickets_ptr")}
        here["stages"] = min(stages, 4) if "ACTIVATION" in given else stages
        built = built_of(few, stored, scaled, **(here | given))
        ptx, loop = built.asm["ptx"], built.asm["ptx"].split("$L__BB0_1:")[1].split("bra")[0]
        assert "wgmma" in loop and "cp.async" in loop, stored
        if stored == "*bf16":  # from memory to the products without registers between
            assert "ld.shared" not in loop and "st.shared" not in loop
        assert built.metadata.shared <= SHARED_BYTES, stored
        allowed = known_spills.get((version, stored, given.get("ACTIVATION", "gelu")), 0)
        spilled = spilled_bytes(built.asm["ptx"])
        assert len(spilled) == 2 and max(spilled) <= allowed, (stored, given, spilled)
    ptx = built_of(one, stored, scaled, WORDS=words, STORED=name, **one_block).asm["ptx"]
    assert "cvt.rn.f32.s8" not in ptx, stored
    loads = [i for i in range(len(ptx)) if ptx.startswith("ld.global", i)]
    assert any(i < ptx.index("griddepcontrol.wait") for i in loads), stored  # before it waits
"""


@needs_triton
@pytest.mark.slow
def test_the_kernel_builds_for_a_large_gpu_and_reads_ahead() -> None:
    run_for_hopper(BUILD)
