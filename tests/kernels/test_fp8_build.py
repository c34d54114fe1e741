"""What the casts to 8 bits are compiled to for a large GPU, without one."""

import pytest

from kernels.hopper import run_for_hopper
from kernels.on_triton import needs_triton

BUILD = """
import importlib
import re
import triton.language as tl
from kernels.hopper import build as build_for_hopper
from kernels.machine_code import lost_registers

TYPES = {n: "i32" for n in ("stride_b", "stride_h", "stride_t", "N_PAIRS", "N", "D", "F", "P")}
TYPES |= {n: "i32" for n in ("W", "T", "first", "n_heads", "n")}
TYPES |= {n: "*fp32" for n in ("inverse_ptr", "hidden_inverse_ptr", "cos_ptr", "sin_ptr")}
TYPES |= {n: "*fp32" for n in ("largest_ptr", "squares_ptr")}

def compiled(kernel, types, constants, odd=()):
    # Sizes but those of `odd` are multiples of 16.
    types = TYPES | types
    sizes = {n for n, kind in types.items() if kind == "i32"} - set(constants) - set(odd)
    built = build_for_hopper(kernel, types, constants, whole=sizes, num_warps=8)
    assert lost_registers(built.asm["sass"]) == [], (kernel, odd)
    return built.asm["ptx"]

def build(kernel, types, **constants):
    ptx = compiled(kernel, types, constants)
    # Nothing is written byte by byte, nor transposed so.
    assert not re.search(r"(ld|st)[.](global|shared)[.](v[24][.])?b(8|16)[^x]", ptx), kernel
    assert "ld.global.v4.b32" in ptx, kernel
    return ptx

load = lambda name: importlib.import_module("pyper.kernels." + name)
cast, activation, heads = load("fp8_cast"), load("fp8_activation"), load("fp8_heads")
build(cast._measure, {}, NORMS=True, ROWS=4, BLOCK_D=2048)
build(activation._hidden_forward, {"hidden_ptr": "*fp8e4nv"}, ACTIVATION="gelu", BLOCK=4096)
turned = [
    build(cast._cast_both, {"rows_ptr": t, "columns_ptr": "*i16"}, PAIRS=64, BLOCK_D=128)
    for t in ("*fp8e4nv", "*fp8e5")
]
types = {"dpre_ptr": "*fp8e5", "columns_ptr": "*i16", "hidden_ptr": "*i16"}
block = dict(HIDDEN=tl.float8e4nv, ACTIVATION="gelu", PAIRS=64, BLOCK_F=32)
turned.append(build(activation._hidden_gradients, types, **block))
compiled(activation._hidden_gradients, types, block, ["P"])
types = {"rows_ptr": "*fp8e5", "columns_ptr": "*i16"}
block = dict(TURNS=True, HALF=64, HEADS=4, PAIRS=32, BLOCK_K=64)
turned.append(build(heads._turn_back_to_fp8, types, **block))
odd = ["N_PAIRS", "T", "P", "first", "n_heads"]
compiled(heads._turn_back_to_fp8, types, block, odd)
compiled(heads._turn_back_to_fp8, types, block | dict(HALF=24, BLOCK_K=32), odd)
for ptx in turned:
    assert "matrix.sync.aligned.m8n8.x4.trans.shared.b16" in ptx
# GELU is computed once for all three results.
assert turned[2].count("ex2.approx") == 16
"""


@needs_triton
@pytest.mark.slow
def test_nothing_is_transposed_byte_by_byte() -> None:
    run_for_hopper(BUILD)
