"""One token per text against a loop over texts and heads, in float64."""

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
