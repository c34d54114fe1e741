"""Heads from one product, turned in place, against products and rotations one by one."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.on_triton import (
    DEVICE,
    angles,
    compare_compiled,
    error,
    kernels,
    leaf,
    limit,
    needs_triton,
    poisoned,
    random,
)
from pyper.kernels import rotary, rotated_heads, rotated_heads_torch

needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def naive(
    x: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, H: int, kv: int
) -> list[Tensor]:
    """Head by head and half by half."""
    K = cos.shape[-1]
    product = x @ weight.T + (0 if bias is None else bias)
    heads = []
    for h, head in enumerate(product.split(K, dim=-1)):
        a, b = head.split(K // 2, dim=-1)
        c, s = cos.squeeze(-2)[..., K // 2 :], sin.squeeze(-2)[..., K // 2 :]
        turned = torch.cat((a * c - b * s, b * c + a * s), dim=-1)
        heads.append(turned if h < H + kv else head)
    return [torch.stack(part, 1) for part in (heads[:H], heads[H : H + kv], heads[H + kv :])]


def compare(
    function: Any,
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    by_row: bool = False,
    biased: bool = False,
) -> None:
    """Values and gradients of all inputs against `naive` in float64."""
    B, T, H, kv, K = shape
    D, W = 6, (H + 2 * kv) * K
    parts = [random(B, T, D, dtype=dtype), random(W, D, seed=1, dtype=dtype)]
    parts += [random(W, seed=2, dtype=dtype)] if biased else []
    turns = angles(B, T, K, by_row=by_row)
    leaves, exact = [leaf(p) for p in parts], [leaf(p, torch.float64) for p in parts]
    no_bias = [] if biased else [None]
    got = function(*leaves, *no_bias, *turns, H, kv)
    expected = naive(*exact, *no_bias, *(turn.double() for turn in turns), H, kv)
    # Gradients come as attention leaves them: heads outside, or inside, or stretched.
    pulls = [random(*part.shape, seed=3 + i, dtype=dtype) for i, part in enumerate(expected)]
    pulls[1] = pulls[1].transpose(1, 2).contiguous().transpose(1, 2)
    pulls[2] = pulls[2][..., :1].expand_as(pulls[2])
    torch.autograd.backward(got, pulls)
    torch.autograd.backward(expected, [pull.double() for pull in pulls])
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == dtype
        assert error(mine, theirs) < limit(dtype)
    for mine, theirs in zip(leaves, exact, strict=True):
        assert error(mine.grad, theirs.grad) < 2 * limit(dtype)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_the_twin_is_the_definition(biased: bool, by_row: bool) -> None:
    compare(rotated_heads_torch, (2, 5, 3, 1, 8), biased=biased, by_row=by_row)


@needs_triton
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_are_the_definition(dtype: torch.dtype, biased: bool, by_row: bool) -> None:
    with kernels():
        compare(rotated_heads, (2, 5, 3, 1, 8), dtype, biased=biased, by_row=by_row)


@needs_triton
@settings(max_examples=10, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 6),
    kv=st.integers(1, 5),
    groups=st.integers(1, 3),
    half=st.integers(1, 12),
)
def test_any_shape_will_do(B: int, T: int, kv: int, groups: int, half: int) -> None:
    with kernels():
        compare(rotated_heads, (B, T, kv * groups, kv, 2 * half))


@needs_triton
def test_more_heads_than_a_block_holds() -> None:
    with kernels():
        compare(rotated_heads, (1, 2, 34, 33, 128))


@needs_triton
def test_every_element_of_the_gradient_is_written() -> None:
    cos, sin = (turn.squeeze(1) for turn in angles(2, 3, 10, by_row=False))
    grads = [random(2, heads, 3, 10) for heads in (5, 3, 3)]
    with poisoned():
        assert rotary.rotation_gradient(*grads, cos, sin).isfinite().all()


@needs_triton
@needs_gpu
@pytest.mark.parametrize("kv_heads", [16, 4])
def test_a_large_expert_on_a_gpu(kv_heads: int) -> None:
    compare(rotated_heads, (4, 2048, 16, kv_heads, 128), torch.bfloat16)


@needs_triton
def test_queries_keys_and_values_are_one_piece_of_memory() -> None:
    x, weight = random(2, 3, 6), random(20, 6, seed=1)
    with kernels():
        heads = rotated_heads(x, weight, None, *angles(2, 3, 4, by_row=False), 3, 1)
    assert len({part.untyped_storage().data_ptr() for part in heads}) == 1
    assert heads[0].untyped_storage().nbytes() == 2 * 3 * 20 * 4
    assert [part.stride() for part in heads] == [(60, 4, 20, 1)] * 3


@needs_triton
def test_it_compiles_without_a_break() -> None:
    given = [random(2, 3, 6), random(20, 6, seed=1), random(20, seed=2)]
    turns = angles(2, 3, 4, by_row=False)

    def loss(*parts: Tensor) -> Tensor:
        query, key, value = rotated_heads(*parts, *turns, 3, 1)
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
        return out.square().sum()

    compare_compiled(loss, given)


@needs_triton
def test_what_compilers_are_told_of_the_operators_is_true() -> None:
    cos, sin = (turn.squeeze(1) for turn in angles(2, 3, 4, by_row=False))
    rows, weight, bias = random(6, 5), random(20, 5, seed=1), random(20, seed=2)
    grads = [random(2, 3, heads, 4).transpose(1, 2) for heads in (3, 1, 1)]
    with kernels():
        torch.library.opcheck(rotary.rotated_product, (rows, weight, bias, cos, sin, 4))
        torch.library.opcheck(rotary.rotation_gradient, (*grads, cos, sin))
