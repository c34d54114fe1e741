"""Queries and keys of several experts, normalised and turned, against norms one by one."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.hopper import run_for_hopper
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
from pyper.kernels import heads, normed_heads, normed_heads_torch

EPS = 1e-3
Shape = tuple[int, int, int, int, int, int]
"""E, B, T, H, kv_heads, K."""


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def naive(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gains: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    H: int,
    T: int,
    eps: float,
) -> list[Tensor]:
    """Expert by expert, head by head and half by half."""
    K, parts = cos.shape[-1], []
    for e, rows in enumerate(x):
        product = rows @ weight[e].T + (0 if bias is None else bias[e])
        split = product.view(-1, T, product.shape[-1] // K, K)
        kv, own = (split.shape[2] - H) // 2, []
        B = len(split)
        for h, head in enumerate(split.unbind(dim=2)):
            if h < H + kv and gains is not None:
                head = head / (head.square().mean(dim=-1, keepdim=True) + eps).sqrt()
                head = head * gains[e, int(h >= H)]
            a, b = head.split(K // 2, dim=-1)
            turn = [t[e * B : (e + 1) * B] if t.ndim == 4 else t for t in (cos, sin)]
            c, s = (t.squeeze(-2)[..., K // 2 :] for t in turn)
            turned = torch.cat((a * c - b * s, b * c + a * s), dim=-1)
            own.append(turned if h < H + kv else head)
        parts.append((own[:H], own[H : H + kv], own[H + kv :]))
    return [torch.cat([torch.stack(p[i], 1) for p in parts]) for i in range(3)]


def compare(
    function: Any,
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    *,
    by_row: bool = False,
    biased: bool = False,
    normed: bool = True,
) -> None:
    """Values and gradients of all inputs against `naive` in float64."""
    E, B, T, H, kv, K = shape
    D, W = 6, (H + 2 * kv) * K
    parts: list[Tensor | None] = [
        random(E, B * T, D, dtype=dtype),
        random(E, W, D, seed=1, dtype=dtype),
        random(E, W, seed=2, dtype=dtype) if biased else None,
        random(E, 2, K, seed=3, dtype=dtype) if normed else None,
    ]
    turns = angles(E * B, T, K, by_row=by_row)
    leaves = [None if p is None else leaf(p) for p in parts]
    exact = [None if p is None else leaf(p, torch.float64) for p in parts]
    got = function(*leaves, *turns, H, T, EPS)
    expected = naive(*exact, *(turn.double() for turn in turns), H, T, EPS)  # type: ignore[arg-type]
    # Gradients come as attention leaves them: heads outside, or inside, or stretched.
    pulls = [random(*part.shape, seed=4 + i, dtype=dtype) for i, part in enumerate(expected)]
    pulls[1] = pulls[1].transpose(1, 2).contiguous().transpose(1, 2)
    pulls[2] = pulls[2][..., :1].expand_as(pulls[2])
    torch.autograd.backward(got, pulls)
    torch.autograd.backward(expected, [pull.double() for pull in pulls])
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == dtype
        assert error(mine, theirs) < limit(dtype)
    for one, other in zip(leaves, exact, strict=True):
        if one is not None and other is not None:
            assert error(one.grad, other.grad) < 4 * limit(dtype)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_the_twin_is_the_definition(normed: bool, by_row: bool) -> None:
    compare(normed_heads_torch, (3, 2, 5, 3, 1, 8), biased=True, by_row=by_row, normed=normed)


@needs_triton
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_are_the_definition(dtype: torch.dtype, normed: bool, by_row: bool) -> None:
    with kernels(), poisoned():
        compare(normed_heads, (3, 2, 5, 3, 1, 8), dtype, by_row=by_row, normed=normed, biased=True)


@needs_triton
@settings(max_examples=10, deadline=None)
@given(
    E=st.integers(1, 3),
    B=st.integers(1, 2),
    T=st.integers(1, 6),
    kv=st.integers(1, 3),
    groups=st.integers(1, 3),
    half=st.integers(1, 12),
)
def test_any_shape_will_do(E: int, B: int, T: int, kv: int, groups: int, half: int) -> None:
    with kernels():
        compare(normed_heads, (E, B, T, kv * groups, kv, 2 * half))


@needs_triton
def test_more_rows_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "_PARTS", 4)
    monkeypatch.setattr(heads, "_TILE", 16)
    with kernels(), poisoned():
        compare(normed_heads, (2, 2, 7, 4, 2, 8), biased=True)


@needs_triton
def test_a_gpu_sees_whole_heads_of_many_tokens() -> None:
    with kernels():
        shape = (8, 8, 512, 4, 4, 64) if DEVICE == "cuda" else (2, 1, 40, 2, 1, 64)
        compare(normed_heads, shape, torch.bfloat16)


@needs_triton
def test_it_compiles_without_a_break() -> None:
    given = [random(2, 6, 5), random(2, 20, 5, seed=1), random(2, 20, seed=2), random(2, 2, 4)]
    turns = angles(2, 3, 4, by_row=False)

    def loss(*parts: Tensor) -> Tensor:
        query, key, value = normed_heads(*parts, *turns, 3, 3, EPS)
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
        return out.square().sum()

    compare_compiled(loss, given)


@needs_triton
def test_what_compilers_are_told_of_the_operators_is_true() -> None:
    cos, sin = (turn.squeeze(1) for turn in angles(2, 3, 4, by_row=False))
    product, gains = random(2, 3, 20), random(2, 2, 4, seed=1)
    grads = [random(2, 3, n, 4).transpose(1, 2) for n in (3, 1, 1)]
    with kernels():
        for own in (gains, None):
            torch.library.opcheck(heads.turned_heads, (product, own, cos, sin, 3, 1, EPS))
            torch.library.opcheck(heads.heads_gradient, (*grads, product, own, cos, sin, EPS))


BUILD = """
from kernels.hopper import build, spilled_bytes
from pyper.kernels import heads

shape = dict(H=4, HALF=32, HAS_GAINS=True, ROWS=32, BLOCK_K=32)
for kernel, constants in (
    (heads._turned_heads, dict(W=768, TURNED=8)),
    (heads._heads_gradient, dict(KV_HEADS=4, PARTS=128)),
):
    constants |= shape
    wide = ("cos_ptr", "sin_ptr", "parts_ptr")
    types = {n: "*fp32" if n in wide else "*bf16" for n in kernel.arg_names if n.endswith("_ptr")}
    types |= {"eps": "fp32"}
    whole = set(kernel.arg_names) - set(types) - set(constants)
    built = build(kernel, types, constants, default="i32", whole=whole, num_warps=4)
    assert spilled_bytes(built.asm["ptx"]) == [0, 0], kernel
"""


@needs_triton
@pytest.mark.slow
def test_the_kernels_build_for_a_large_gpu_without_spills() -> None:
    run_for_hopper(BUILD)
