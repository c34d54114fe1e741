"""One token per text against a loop over texts and heads, in float64."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from kernels.hopper import run_for_hopper
from kernels.on_triton import DEVICE, error, kernels, limit, needs_triton, poisoned, random
from pyper.kernels import Turn, paged_attention, paged_attention_torch

PAGE = 16
# B, H, kv_heads, K, and the lengths of the texts with their new token
SHAPES = [
    ((1, 16, 16, 32), [1]),
    ((1, 4, 4, 64), [300]),
    ((3, 4, 2, 16), [1, 16, 17]),
    ((2, 8, 1, 24), [64, 65]),
    ((5, 6, 2, 32), [2, 31, 129, 15, 70]),
    ((2, 4, 4, 256), [1, 80]),  # rows too wide for long blocks
    ((3, 48, 48, 8), [1, 64, 130]),  # so many that there is one part
    ((9, 240, 120, 8), [1, 64, 130, 2, 65, 7, 16, 17, 129]),  # two heads of keys for a program
    ((17, 16, 16, 8), list(range(1, 18))),
    ((2, 16, 16, 8), [197, 60]),  # of the first, two parts are worth putting together
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
@pytest.mark.parametrize(("shape", "lengths"), SHAPES)
def test_the_last_part_puts_all_together_time_and_again(
    shape: tuple[int, ...], lengths: list[int]
) -> None:
    tickets = torch.zeros(shape[0] * shape[2], dtype=torch.int32, device=DEVICE)
    with kernels(), poisoned():
        for dtype in (torch.float32, torch.bfloat16, torch.bfloat16):
            compare(partial(paged_attention, tickets=tickets), shape, lengths, dtype)
            assert not tickets.any()


@contextmanager
def parts_first() -> Iterator[None]:
    """The interpreter runs the first part of all texts, then the second, as a GPU may."""
    if DEVICE == "cuda":
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder

    plain = InterpreterBuilder.set_grid_idx

    def turned(builder: Any, *at: int) -> None:
        texts, heads, parts = builder.grid_dim
        n = (at[0] * heads + at[1]) * parts + at[2]
        plain(builder, n // heads % texts, n % heads, n // (texts * heads))

    with mock.patch.object(InterpreterBuilder, "set_grid_idx", turned):
        yield


@needs_triton
@pytest.mark.parametrize(
    ("shape", "lengths"),
    [
        ((2, 16, 16, 16), [1025, 257]),
        ((3, 4, 2, 16), [900, 200, 400]),
        ((5, 6, 2, 32), [2, 31, 129, 15, 70]),
    ],
)
def test_parts_of_texts_of_other_lengths_do_not_meet(
    shape: tuple[int, ...], lengths: list[int]
) -> None:
    tickets = torch.zeros(shape[0] * shape[2], dtype=torch.int32, device=DEVICE)
    with kernels(), poisoned(), parts_first():
        compare(partial(paged_attention, tickets=tickets), shape, lengths, torch.bfloat16)
    assert not tickets.any()


def as_product(tensors: list[Tensor]) -> list[Tensor]:
    """Query, key and value as one product writes them: parts of one row."""
    query, key, value = tensors[:3]
    row = torch.cat([t.flatten(1) for t in (query, key, value)], dim=1)
    widths = [t.shape[1] * t.shape[2] for t in (query, key, value)]
    parts = row.split(widths, dim=1)
    return [
        p.view(t.shape) if p.is_contiguous() else p.unflatten(1, t.shape[1:])
        for p, t in zip(parts, (query, key, value), strict=True)
    ] + tensors[3:]


def turned_by_hand(x: Tensor, gain: Tensor | None, eps: float, positions: Tensor) -> Tensor:
    """x (B, heads, K) normalised and turned, pair by pair, in float64."""
    x, K = x.double(), x.shape[-1]
    if gain is not None:
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain.double()
    out = torch.empty_like(x)
    for b, position in enumerate(positions.tolist()):
        for i in range(K // 2):
            angle = torch.tensor(position * 100.0 ** (-2 * i / K), dtype=torch.float64)
            first, second = x[b, :, i], x[b, :, i + K // 2]
            out[b, :, i] = first * angle.cos() - second * angle.sin()
            out[b, :, i + K // 2] = second * angle.cos() + first * angle.sin()
    return out


def turn_of(K: int, longest: int, gains: tuple[Tensor, Tensor] | None) -> Turn:
    frequencies = 100.0 ** (-2 * torch.arange(K // 2, dtype=torch.float64) / K)
    angles = torch.arange(longest)[:, None] * frequencies
    cos = torch.cat((angles.cos(), angles.cos()), dim=1)
    sin = torch.cat((-angles.sin(), angles.sin()), dim=1)
    return Turn(cos.float().to(DEVICE), sin.float().to(DEVICE), gains, 1e-5)


def compare_turned(
    function: object,
    shape: tuple[int, ...],
    lengths: list[int],
    dtype: torch.dtype,
    normed: bool,
) -> None:
    tensors, pages, positions = case(shape, lengths, dtype)
    K = shape[-1]
    gains = tuple(1 + 0.3 * random(K, seed=9 + i, dtype=dtype) for i in range(2))
    by_hand = list(tensors)
    for i in range(2):
        gain = gains[i] if normed else None
        by_hand[i] = turned_by_hand(tensors[i], gain, 1e-5, positions)
    expected, keys, values = naive(by_hand, pages, positions)
    tensors = as_product(tensors)
    turn = turn_of(K, max(lengths), gains if normed else None)
    got = function(*tensors, pages, positions, PAGE, turn)
    assert error(got, expected) < 1.5 * limit(dtype)  # keys are rounded as well
    assert error(tensors[3], keys) < limit(dtype)
    assert torch.equal(tensors[4].double(), values)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "lengths"), SHAPES[2:5])
def test_the_twin_turns_heads_as_by_hand(
    shape: tuple[int, ...], lengths: list[int], dtype: torch.dtype, normed: bool
) -> None:
    compare_turned(paged_attention_torch, shape, lengths, dtype, normed)


@needs_triton
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "lengths"), SHAPES[2:5])
def test_the_kernel_turns_heads_as_by_hand(
    shape: tuple[int, ...], lengths: list[int], dtype: torch.dtype, normed: bool
) -> None:
    with kernels(), poisoned():
        compare_turned(paged_attention, shape, lengths, dtype, normed)


@needs_triton
def test_what_compilers_are_told_of_the_operator_is_true() -> None:
    """Shapes and types of the output; keys and values change, nothing else."""
    tensors, pages, positions = case((2, 4, 2, 16), [3, 17], torch.float32)
    module = importlib.import_module("pyper.kernels.paged_attention")
    tickets = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    with kernels():
        given = (*tensors, pages, positions, PAGE, None, None, None, None, 0.0, tickets, False)
        torch.library.opcheck(module._paged_attention_op, given)


@pytest.mark.parametrize(
    ("n_texts", "row_bytes", "parts"),
    [
        (1, 256, (16, 32, 3, 4, 1, 1)),
        (2, 256, (8, 64, 5, 4, 2, 1)),
        (8, 256, (2, 64, 5, 4, 8, 1)),
        (8, 512, (4, 32, 3, 4, 1, 1)),
        (16, 256, (1, 64, 5, 4, 16, 1)),
        (64, 256, (1, 64, 3, 4, 1, 2)),
    ],
)
def test_few_texts_have_few_programs_and_many_no_more_than_run(
    n_texts: int, row_bytes: int, parts: tuple[int, ...]
) -> None:
    module = importlib.import_module("pyper.kernels.paged_attention")
    assert module._parts(n_texts, 16, row_bytes, 1) == parts


@pytest.mark.parametrize(("n_kv_heads", "groups"), [(24, 5), (8, 4), (1, 71), (3, 1), (48, 1)])
def test_the_heads_of_a_program_are_a_power_of_two_that_divides_them(
    n_kv_heads: int, groups: int
) -> None:
    module = importlib.import_module("pyper.kernels.paged_attention")
    for n_texts in (1, 64, 128, 500):
        heads = module._parts(n_texts, n_kv_heads, 256, groups).heads
        assert n_kv_heads % heads == heads & (heads - 1) == 0
        assert heads == 1 or heads * groups <= 16


BUILD = """
import importlib
from kernels.hopper import build

module = importlib.import_module("pyper.kernels.paged_attention_kernel")

sums = {"part_ptr": "*fp32", "log_sum_ptr": "*fp32", "cos_ptr": "*fp32", "sin_ptr": "*fp32"}
numbers = {"tickets_ptr": "*i32", "pages_ptr": "*i64", "positions_ptr": "*i64"}
numbers |= {"scale": "fp32", "eps": "fp32"}
numbers |= {f"{name}_stride": "i32" for name in ("query", "key", "value", "pages")}
shape = {"K": 128, "PAGE": 16, "BLOCK_G": 16, "BLOCK_S": 64, "BLOCK_K": 128}
shape |= {"HAS_TURN": True, "HAS_NORM": True, "OVERLAP": True}
shape |= {"HAS_TICKETS": True, "MOST_PARTS": 16, "LEAST_BLOCKS": 4}
for stages, warps, heads, groups in (3, 4, 2, 1), (5, 4, 1, 1), (3, 4, 4, 4), (5, 4, 1, 8):
    constants = shape | {"STAGES": stages, "HEADS": heads, "GROUPS": groups}
    options = {"num_warps": warps, "num_stages": stages}
    ptx = build(module.attend_part, sums | numbers, constants, **options).asm["ptx"]
    assert "cp.async.cg" in ptx  # sixteen bytes at a time, while others are used
    assert "mma.sync" in ptx
constants = {"K": 128, "N_PARTS": 16, "BLOCK_K": 128, "OVERLAP": True}
build(module.join_parts, sums, constants, num_warps=2, num_stages=3)
"""


@needs_triton
@pytest.mark.slow
def test_the_kernels_build_for_a_large_gpu_and_read_ahead() -> None:
    run_for_hopper(BUILD)
