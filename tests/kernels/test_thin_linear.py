"""The linear map of few rows against a loop over rows, in float64."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from kernels.on_triton import DEVICE, error, kernels, limit, needs_triton, poisoned, random
from pyper.config.expert import Activation
from pyper.kernels import InputNorm, ThinWeight, thin_linear, thin_linear_torch

# B, D, N
SHAPES = [
    (1, 32, 16),
    (1, 96, 40),
    (1, 2500, 9),
    (1, 33, 5),
    (3, 300, 17),
    (16, 64, 33),
    (17, 48, 16),
    (64, 40, 24),
]
CHOICES: list[tuple[bool, bool, bool, Activation | None]] = [
    (False, False, False, None),
    (True, False, False, "gelu"),
    (True, True, False, "swiglu"),
    (False, False, True, None),
    (True, True, True, "relu2"),
    (False, True, False, "gelu_tanh"),
]
BF16 = torch.bfloat16


def weight_of(N: int, D: int, stored: torch.dtype, *, bias: bool) -> ThinWeight:
    weight = random(N, D, seed=1, dtype=torch.float32)
    own_bias = random(N, seed=2, dtype=BF16) if bias else None
    if stored == BF16:
        return ThinWeight(weight.to(BF16), None, own_bias)
    largest = 127.0 if stored == torch.int8 else 448.0
    scale = weight.abs().amax(dim=1) / largest
    narrow = weight / scale[:, None]
    narrow = narrow.round() if stored == torch.int8 else narrow
    return ThinWeight(narrow.to(stored), scale, own_bias)


def naive(
    x: Tensor,
    weight: ThinWeight,
    norm: InputNorm | None,
    activation: Activation | None,
    residual: Tensor | None,
) -> Tensor:
    rows = []
    for row in x.double():
        if norm is not None:
            row = row / (row.square().mean() + norm.eps).sqrt() * norm.gain.double()
        out = weight.weight.double() @ row
        if weight.scale is not None:
            out = out * weight.scale.double()
        if weight.bias is not None:
            out = out + weight.bias.double()
        if activation == "swiglu":
            gate, value = out.chunk(2)
            out = gate / (1 + (-gate).exp()) * value
        elif activation == "relu2":
            out = out.clamp(min=0) ** 2
        elif activation is not None:
            kind = "tanh" if activation == "gelu_tanh" else "none"
            out = torch.nn.functional.gelu(out, approximate=kind)
        rows.append(out)
    total = torch.stack(rows)
    return total if residual is None else residual.double() + total


def compare(
    function: object,
    shape: tuple[int, int, int],
    stored: torch.dtype,
    choice: tuple[object, ...],
) -> None:
    (B, D, N), (has_norm, bias, has_residual, activation) = shape, choice
    x = random(B, D, seed=0, dtype=BF16)
    weight = weight_of(2 * N if activation == "swiglu" else N, D, stored, bias=bool(bias))
    norm = InputNorm(1 + 0.3 * random(D, seed=3, dtype=BF16), 1e-5) if has_norm else None
    residual = random(B, N, seed=4, dtype=BF16) if has_residual else None
    expected = naive(x, weight, norm, activation, residual)
    got = function(x, weight, norm=norm, activation=activation, residual=residual)
    assert got.dtype == BF16
    assert got.shape == (B, N)
    # the input is rounded once more with its gain, and squares and gates double an error
    assert error(got, expected) < 2 * limit(BF16)


STORED = [BF16, torch.int8, torch.float8_e4m3fn]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("stored", STORED)
def test_the_twin_matches_a_loop(stored: torch.dtype, choice: tuple[object, ...]) -> None:
    for shape in SHAPES:
        compare(thin_linear_torch, shape, stored, choice)


@needs_triton
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_matches_a_loop(
    shape: tuple[int, int, int], stored: torch.dtype, choice: tuple[object, ...]
) -> None:
    with kernels(), poisoned():
        compare(thin_linear, shape, stored, choice)


@needs_triton
def test_what_compilers_are_told_of_the_operator_is_true() -> None:
    module = importlib.import_module("pyper.kernels.thin_linear")
    x, gain = random(2, 32, seed=0, dtype=BF16), random(32, seed=1, dtype=BF16)
    weight = weight_of(32, 32, torch.int8, bias=True)
    given = (x, weight.weight, weight.scale, weight.bias, gain, 1e-6, "swiglu", None, False)
    with kernels():
        torch.library.opcheck(module._thin_linear_op, given)


def test_many_rows_and_wide_types_go_to_the_library() -> None:
    """A result that no kernel has touched is the twin's to the bit."""
    weight = ThinWeight(random(8, 16, seed=1, dtype=torch.float64))
    x = random(3, 16, seed=0, dtype=torch.float64)
    with kernels():
        assert torch.equal(thin_linear(x, weight), thin_linear_torch(x, weight))
    assert DEVICE in str(x.device)


BUILD = """
import importlib
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def build(kernel, stored, scaled, **constants):
    constants |= dict(N=8192, ACTIVATION="gelu", HAS_NORM=True, HAS_SCALE=scaled,
                      HAS_BIAS=False, HAS_RESIDUAL=False, OVERLAP=True)
    absent = {"bias_ptr": None, "residual_ptr": None} | ({} if scaled else {"scale_ptr": None})
    constants |= absent
    types = {"weight_ptr": stored, "words_ptr": "*i32", "scale_ptr": "*fp32"}
    types |= {"B": "i32", "eps": "fp32"}
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "*bf16") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if "*" in signature[n]}
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": 4, "num_stages": 4}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

few = importlib.import_module("pyper.kernels.thin_linear")._thin_linear
one = importlib.import_module("pyper.kernels.row_linear")._linear_of_row
few_blocks = dict(D=2048, BLOCK_B=16, BLOCK_N=32, BLOCK_D=256, LINES=16)
one_block = dict(BLOCK_N=4, BLOCK_W=512)
for stored, scaled, name, words in (
    ("*bf16", False, "bf16", 1024), ("*i8", True, "int8", 512), ("*fp8e4nv", True, "fp8", 512)
):
    ptx = build(few, stored, scaled, **few_blocks).asm["ptx"]
    assert "cp.async" in ptx, stored  # weights are on their way while others are used
    assert "mma.sync" in ptx or "wgmma" in ptx, stored
    assert ptx.index("prefetch.global.L2") < ptx.index("griddepcontrol.wait"), stored
    ptx = build(one, stored, scaled, WORDS=words, STORED=name, **one_block).asm["ptx"]
    assert "cvt.rn.f32.s8" not in ptx, stored
    loads = [i for i in range(len(ptx)) if ptx.startswith("ld.global", i)]
    assert any(i < ptx.index("griddepcontrol.wait") for i in loads), stored  # before it waits
"""


@needs_triton
@pytest.mark.slow
def test_the_kernel_builds_for_a_large_gpu_and_reads_ahead() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", BUILD], check=True, env=environment)
