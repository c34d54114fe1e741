import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyper.routing import LayerStatistics, layer_statistics, routing_summary, sum_statistics

shapes = {"n": st.integers(1, 20), "e": st.integers(1, 6), "seed": st.integers(0, 99)}


def pool(n: int, e: int, seed: int) -> dict[str, Tensor]:
    """Choices of two rules, sigmoid gates and padding."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, n, e, generator=generator)
    return {
        "chosen": logits[0] > 0.5,
        "other": logits[1] > 0.3,
        "router_probs": logits[2].sigmoid(),
        "padding": torch.rand(n, generator=generator) > 0.6,
    }


def assert_same(left: LayerStatistics, right: LayerStatistics) -> None:
    for field in dataclasses.fields(LayerStatistics):
        torch.testing.assert_close(
            getattr(left, field.name), getattr(right, field.name), msg=lambda m, f=field: f.name + m
        )


@settings(max_examples=60, deadline=None)
@given(**shapes, padded=st.booleans())
def test_every_field_matches_the_obvious_loop(n: int, e: int, seed: int, padded: bool) -> None:
    given = pool(n, e, seed)
    if not padded:
        given["padding"] = None
    got = layer_statistics(**given, threshold_gap=torch.tensor(0.25))
    rows = [i for i in range(n) if not padded or not given["padding"][i]]
    load, fan_out, entropy, flips = [0] * e, [0] * (e + 1), 0.0, 0
    for i in rows:
        met = [j for j in range(e) if given["chosen"][i, j]]
        fan_out[len(met)] += 1
        for j in met:
            load[j] += 1
        probs = [float(p) for p in given["router_probs"][i]]
        entropy -= sum(p / sum(probs) * math.log(p / sum(probs)) for p in probs)
        flips += sum(bool(given["chosen"][i, j] != given["other"][i, j]) for j in range(e))
    assert got.n_tokens == len(rows)
    assert got.expert_load.tolist() == load
    assert got.fan_out.tolist() == fan_out
    assert got.router_entropy == pytest.approx(entropy / max(len(rows), 1), abs=1e-5)
    assert got.flip_rate == pytest.approx(flips / max(len(rows) * e, 1))
    assert got.threshold_gap == 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_fields_are_float32_without_gradient_whatever_comes_in(dtype: torch.dtype) -> None:
    given = pool(8, 3, 0)
    given["router_probs"] = given["router_probs"].to(dtype).requires_grad_()
    for gap in (None, torch.tensor(1.0, requires_grad=True)):
        got = layer_statistics(**given, threshold_gap=gap)
        for field in dataclasses.fields(LayerStatistics):
            value = getattr(got, field.name)
            assert value.dtype == torch.float32, field.name
            assert not value.requires_grad, field.name
        assert got.expert_load.shape == (3,)
        assert got.fan_out.shape == (4,)
        assert got.n_tokens.shape == got.router_entropy.shape == got.flip_rate.shape == ()


def test_without_another_rule_or_threshold_the_fields_are_zero() -> None:
    got = layer_statistics(**{k: pool(8, 3, 0)[k] for k in ("chosen", "router_probs")})
    assert got.flip_rate == 0
    assert got.threshold_gap == 0


def test_padding_counts_nowhere_whatever_stands_there() -> None:
    given = pool(12, 4, 3)
    padding = given.pop("padding")
    assert 0 < padding.sum() < 12
    real = layer_statistics(**{k: v[~padding] for k, v in given.items()})
    given["chosen"][padding] = True
    given["other"][padding] = False
    given["router_probs"][padding] = torch.nan
    assert_same(layer_statistics(**given, padding=padding), real)


@settings(max_examples=30, deadline=None)
@given(**shapes, parts=st.integers(1, 4))
def test_the_sum_of_the_parts_is_the_whole(n: int, e: int, seed: int, parts: int) -> None:
    given = pool(n, e, seed)
    gap = torch.tensor(0.5)
    given["padding"][0] = False  # a mean over nothing is no mean of the parts' gaps
    whole = layer_statistics(**given, threshold_gap=gap)
    pieces = [
        dict(zip(given, rows, strict=True))
        for rows in zip(*(v.tensor_split(parts) for v in given.values()), strict=True)
    ]
    summed = sum_statistics([layer_statistics(**piece, threshold_gap=gap) for piece in pieces])
    assert_same(summed, whole)


def test_means_are_weighted_by_tokens() -> None:
    def of(n: int, gap: float) -> LayerStatistics:
        chosen, probs = torch.ones(n, 2, dtype=torch.bool), torch.ones(n, 2)
        return layer_statistics(chosen, probs, threshold_gap=torch.tensor(gap))

    assert sum_statistics([of(1, 0.0), of(3, 1.0)]).threshold_gap == 0.75
    assert sum_statistics([of(0, 9.0), of(2, 1.0)]).threshold_gap == 1.0


def test_entropy_is_that_of_a_distribution_over_experts() -> None:
    chosen = torch.zeros(2, 4, dtype=torch.bool)
    alike = layer_statistics(chosen, torch.full((2, 4), 0.9))  # sigmoids do not sum to 1
    assert alike.router_entropy == pytest.approx(math.log(4))
    certain = layer_statistics(chosen, torch.eye(4)[:2])
    assert certain.router_entropy == 0
    none = layer_statistics(chosen, torch.zeros(2, 4))  # all underflowed
    assert none.router_entropy == 0


def test_no_token_at_all_gives_zeros() -> None:
    given = pool(5, 3, 0)
    given["padding"] = torch.ones(5, dtype=torch.bool)
    nothing = layer_statistics(**given)
    for statistics in (nothing, sum_statistics([nothing, nothing])):
        for field in dataclasses.fields(LayerStatistics):
            assert (getattr(statistics, field.name) == 0).all(), field.name
        assert all(math.isfinite(value) for value in routing_summary(statistics).values())


def test_the_summary_says_what_is_logged() -> None:
    chosen = torch.tensor([[1, 0], [1, 1], [0, 0], [1, 0]]).bool()
    other = torch.tensor([[1, 0], [1, 0], [0, 1], [1, 0]]).bool()
    probs = torch.full((4, 2), 0.5)
    gap = torch.tensor(0.125)
    got = routing_summary(layer_statistics(chosen, probs, other=other, threshold_gap=gap))
    assert got == pytest.approx(
        {
            "experts_per_token": 1.0,
            "zero_expert_share": 0.25,
            "max_violation": 0.5,  # loads 3 and 1
            "router_entropy": math.log(2),
            "load_entropy": -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)),
            "flip_rate": 0.25,
            "threshold_gap": 0.125,
        }
    )
    even = routing_summary(layer_statistics(torch.ones(4, 2).bool(), probs))
    assert even["max_violation"] == 0
    assert even["experts_per_token"] == 2
