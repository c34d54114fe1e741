"""One token per text against a loop over texts and heads, in float64."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from kernels.on_triton import DEVICE, error, kernels, limit, needs_triton, poisoned, random
from pyper.kernels import paged_attention, paged_attention_torch

PAGE = 16
# B, H, kv_heads, K, and the lengths of the texts with their new token
SHAPES = [
    ((1, 16, 16, 32), [1]),
    ((1, 4, 4, 64), [300]),
    ((3, 4, 2, 16), [1, 16, 17]),
    ((2, 8, 1, 24), [64, 65]),
    ((5, 6, 2, 32), [2, 31, 129, 15, 70]),
    ((17, 16, 16, 8), list(range(1, 18))),  # so many that there is one part
]


def case(
    shape: tuple[int, int, int, int], lengths: list[int], dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Query, key, value, keys, values; pages and positions. Pages lie in random order."""
    B, H, kv_heads, K = shape
    n_pages = -(-max(lengths) // PAGE)
    order = torch.randperm(B * n_pages, generator=torch.Generator().manual_seed(1)) + 1
    pages = order.view(B, n_pages)
    for row, length in enumerate(lengths):
        pages[row, -(-length // PAGE) :] = 0
    n_slots = (B * n_pages + 1) * PAGE
    sizes = [(B, H, K), *[(B, kv_heads, K)] * 2, *[(n_slots, kv_heads, K)] * 2]
    tensors = [random(*size, seed=i, dtype=dtype) for i, size in enumerate(sizes)]
    return tensors, pages.to(DEVICE), torch.tensor(lengths, device=DEVICE) - 1


def naive(tensors: list[Tensor], pages: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
    query, key, value, keys, values = (t.double() for t in tensors)
    keys, values, out = keys.clone(), values.clone(), torch.empty_like(query)
    groups = query.shape[1] // key.shape[1]
    for b, position in enumerate(positions.tolist()):
        slots = [int(pages[b, s // PAGE]) * PAGE + s % PAGE for s in range(position + 1)]
        keys[slots[-1]], values[slots[-1]] = key[b], value[b]
        for h in range(query.shape[1]):
            scores = keys[slots, h // groups] @ query[b, h] / query.shape[-1] ** 0.5
            out[b, h] = scores.softmax(0) @ values[slots, h // groups]
    return out, keys, values


def compare(
    function: object, shape: tuple[int, ...], lengths: list[int], dtype: torch.dtype
) -> None:
    tensors, pages, positions = case(shape, lengths, dtype)
    expected, keys, values = naive(tensors, pages, positions)
    got = function(*tensors, pages, positions, PAGE)
    assert got.dtype == dtype
    assert error(got, expected) < limit(dtype)
    assert torch.equal(tensors[3].double(), keys)
    assert torch.equal(tensors[4].double(), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "lengths"), SHAPES)
def test_the_twin_matches_a_loop(
    shape: tuple[int, ...], lengths: list[int], dtype: torch.dtype
) -> None:
    compare(paged_attention_torch, shape, lengths, dtype)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "lengths"), SHAPES)
def test_the_kernel_matches_a_loop(
    shape: tuple[int, ...], lengths: list[int], dtype: torch.dtype
) -> None:
    with kernels(), poisoned():
        compare(paged_attention, shape, lengths, dtype)


@needs_triton
def test_what_compilers_are_told_of_the_operator_is_true() -> None:
    """Shapes and types of the output; keys and values change, nothing else."""
    tensors, pages, positions = case((2, 4, 2, 16), [3, 17], torch.float32)
    module = importlib.import_module("pyper.kernels.paged_attention")
    with kernels():
        torch.library.opcheck(module._paged_attention_op, (*tensors, pages, positions, PAGE))


BUILD = """
import importlib
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

module = importlib.import_module("pyper.kernels.paged_attention")

def build(kernel, types, constants, warps):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "*bf16") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if "*" in signature[n]}
    source = ASTSource(kernel, signature, constants, aligned)
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": warps}).asm["ptx"]

sums = {"part_ptr": "*fp32", "log_sum_ptr": "*fp32"}
numbers = {"pages_ptr": "*i64", "positions_ptr": "*i64", "pages_stride": "i32", "scale": "fp32"}
shape = {"K": 128, "GROUPS": 1, "PAGE": 16, "BLOCK_G": 1, "BLOCK_S": 64, "BLOCK_K": 128}
assert "ld.global.v4" in build(module._attend_part, sums | numbers, shape, 4)
build(module._join_parts, sums, {"K": 128, "N_PARTS": 16, "BLOCK_K": 128}, 2)
"""


@needs_triton
@pytest.mark.slow
def test_the_kernels_build_for_a_large_gpu_and_read_sixteen_bytes_at_a_time() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", BUILD], check=True, env=environment)
