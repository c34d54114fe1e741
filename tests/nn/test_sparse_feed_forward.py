"""Sparse feed-forwards against a loop over tokens and experts, and what must hold of them."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nn.naive_sparse import (
    chosen_by,
    gates_of,
    naive_forward,
    one_feed_forward,
    random_input,
    random_layer,
)
from nn.small_experts import small_expert, text_of
from pyper.nn.expert_linear import ExpertLinear
from pyper.nn.sparse_feed_forward import SparseFeedForward

CHOOSING: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid": {"gate": "sigmoid"},
    "half": {"capacity_factor": 0.5},
    "two": {"capacity_factor": 2.0, "gate": "sigmoid"},
    "shared": {"shared_d_ff": 8},
    "capped": {"routing": "capped", "max_experts_per_token": 1, "capacity_factor": 0.75},
    "capped two": {"routing": "capped", "capacity_factor": 1.5},
}
CHOSEN: dict[str, dict[str, Any]] = {
    "top 1": {"routing": "token_choice"},
    "top 2": {"routing": "token_choice", "top_k": 2},
    "top 2 of sigmoids": {"routing": "token_choice", "top_k": 2, "gate": "sigmoid"},
    "sign bias": {"routing": "token_choice", "balance": "sign_bias", "shared_d_ff": 8},
}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "swiglu": {"activation": "swiglu"},
    "biases": {"feed_forward_bias": True},
    "relu2": {"activation": "relu2", "feed_forward_bias": True},
}


def assert_close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def gradients(layer: SparseFeedForward, x: Tensor, out: Tensor) -> dict[str, Tensor]:
    """Of a random weighting of the outputs, for every parameter and the input."""
    loss = (out * random_input(*out.shape[:2], seed=99)).sum()
    named = {"input": x} | dict(layer.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    zero = [
        torch.zeros_like(p) if g is None else g for g, p in zip(found, named.values(), strict=True)
    ]
    return dict(zip(named, zero, strict=True))


def check_against_the_loop(layer: SparseFeedForward, rule: str | None, effective: str) -> None:
    """Values, every gradient, and the numbers of tokens by expert."""
    x = random_input(3, 8, seed=5).requires_grad_()
    out, routed = layer(x, rule)
    chosen = chosen_by(layer, x.detach().flatten(0, 1), effective, n_rows=3)
    expected = naive_forward(layer, x, chosen)
    assert 0 < int(chosen.sum()) < chosen.numel()
    assert_close(out, expected)
    assert routed.statistics.expert_load.tolist() == chosen.sum(dim=0).tolist()
    theirs = gradients(layer, x, expected)
    for name, gradient in gradients(layer, x, out).items():
        assert_close(gradient, theirs[name])
    assert float(theirs["router.weight"].abs().max()) > 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparse", CHOOSING)
@pytest.mark.parametrize("rule", ["training", "threshold", "expert_choice", "per_sequence"])
def test_experts_that_choose_equal_the_loop(sparse: str, shape: str, rule: str) -> None:
    layer = random_layer(CHOOSING[sparse], **SHAPES[shape])
    if rule == "training":
        check_against_the_loop(layer.train(), None, "expert_choice")
    elif rule == "threshold":
        check_against_the_loop(layer.eval(), None, "threshold")
    else:
        check_against_the_loop(layer.eval(), rule, rule)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparse", CHOSEN)
@pytest.mark.parametrize("training", [True, False])
def test_tokens_that_choose_equal_the_loop(sparse: str, shape: str, training: bool) -> None:
    layer = random_layer(CHOSEN[sparse], **SHAPES[shape])
    check_against_the_loop(layer.train(training), None, "expert_choice")


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_training_by_thresholds_equals_the_loop(gate: str) -> None:
    layer = random_layer({"routing": "threshold", "gate": gate, "threshold_after": 0.2}).train()
    layer.state.begin_step(0.1)
    check_against_the_loop(layer, None, "expert_choice")
    layer.state.begin_step(0.2)
    check_against_the_loop(layer, None, "threshold")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spare", [0, 1, 40])
def test_with_room_for_more_rows_outputs_and_gradients_are_the_same(
    shape: str, spare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grouped products leave rows of no expert as they find them: here as not a number."""
    layer = random_layer(CHOOSING["softmax"], **SHAPES[shape])
    monkeypatch.setattr(ExpertLinear, "grouped", grouped_among_others)
    tokens, gates = random_input(3, 7).flatten(0, 1), random_input(3, 7, seed=3).flatten(0, 1)
    gates, tokens = gates[:, : layer.sparse.n_experts].detach(), tokens.detach()
    chosen = gates > 0.3
    found = []
    for run in (layer._run_one_by_one, partial(layer._run_room, room=int(chosen.sum()) + spare)):
        leaves = tokens.clone().requires_grad_(), gates.clone().requires_grad_()
        out = run(*leaves, chosen)
        named = dict(layer.up.named_parameters("up")) | dict(layer.down.named_parameters("down"))
        wanted = (*leaves, *named.values())
        found.append((out, *torch.autograd.grad(out.square().sum(), wanted)))
    for one, other in zip(*found, strict=True):
        assert_close(other, one)


def grouped_among_others(self: ExpertLinear, x: Tensor, expert: Tensor, ends: Tensor) -> Tensor:
    """`ExpertLinear.grouped` in any type, with nothing sound behind the last row."""
    parts = x[: ends[-1]].split(torch.diff(ends, prepend=ends.new_zeros(1)).tolist())
    rest = x[ends[-1] :] @ (self.weight[0].detach().mT * torch.nan)
    out = torch.cat([*(part @ w.mT for part, w in zip(parts, self.weight, strict=True)), rest])
    return out if self.bias is None else out + self.bias[expert]


def test_an_expert_with_more_tokens_than_a_block_of_rows_equals_the_loop() -> None:
    """Where every token passes, products are filled up to whole blocks."""
    layer = random_layer({}, feed_forward_bias=True).eval()
    layer.state.threshold_total.fill_(-1.0)
    x = random_input(5, 29)
    out, routed = layer(x)
    assert routed.statistics.expert_load.tolist() == [145] * 4
    assert_close(out, naive_forward(layer, x, torch.ones(145, 4, dtype=torch.bool)))


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 4),
    length=st.integers(1, 9),
    n_experts=st.integers(2, 5),
    capacity_factor=st.floats(0.1, 2.0),
    routing=st.sampled_from(["expert_choice", "capped"]),
    more=st.integers(0, 5),
    seed=st.integers(0, 3),
)
def test_each_expert_takes_exactly_its_capacity_and_padding_changes_nothing(
    batch: int,
    length: int,
    n_experts: int,
    capacity_factor: float,
    routing: str,
    more: int,
    seed: int,
) -> None:
    capacity = int(capacity_factor * batch * length / n_experts + 1e-6)
    assume(capacity >= 1)
    sparse = {"routing": routing, "n_experts": n_experts, "capacity_factor": capacity_factor}
    layer = random_layer(sparse, seed=seed).train()
    x = random_input(batch, length, seed=seed)
    out, routed = layer(x)
    assert routed.statistics.expert_load.tolist() == [capacity] * n_experts

    # Padding that every expert would love, on the right
    padded = torch.cat([x, 30 * random_input(batch, more, seed=7)], dim=1)
    absent = torch.arange(length + more).expand(batch, -1) >= length
    padded_out, padded_routed = layer(padded, None, absent)
    assert_close(padded_out[:, :length], out)
    assert not padded_out[:, length:].any()
    for name, value in vars(routed.statistics).items():
        torch.testing.assert_close(getattr(padded_routed.statistics, name), value)


@pytest.mark.parametrize("sparse", ["softmax", "sigmoid", "capped", "top 2"])
@pytest.mark.parametrize("rule", [None, "per_sequence"])
@pytest.mark.parametrize("training", [True, False])
def test_ragged_padding_is_neither_chosen_nor_counted(
    sparse: str, rule: str | None, training: bool
) -> None:
    layer = random_layer((CHOOSING | CHOSEN)[sparse]).train(training)
    x = random_input(3, 10)
    absent = torch.arange(10) >= torch.tensor([10, 6, 8])[:, None]
    out, routed = layer(x, rule, absent)
    other, _ = layer(x.masked_fill(absent[..., None], 30.0), rule, absent)
    assert not out[absent].any()
    assert_close(other, out)
    assert float(routed.statistics.n_tokens) == 24
    assert float(routed.statistics.fan_out.sum()) == 24


def test_what_a_step_observes_leaves_padding_out() -> None:
    layer = random_layer({}).train()
    x = random_input(2, 8)
    padded = torch.cat([x, 30 * random_input(2, 4, seed=7)], dim=1)
    layer(x)
    layer(padded, None, torch.arange(12).expand(2, -1) >= 8)
    plain, with_padding = layer.state._kth_scores
    torch.testing.assert_close(with_padding, plain)


@pytest.mark.parametrize("balance", ["loss", "sign_bias", "quantile_bias"])
def test_balancing_leaves_padding_out(balance: str) -> None:
    sparse = {"routing": "token_choice", "balance": balance, "router_z_weight": 0.1}
    plain, padded = random_layer(sparse).train(), random_layer(sparse).train()
    x, absent = random_input(2, 8), torch.arange(12).expand(2, -1) >= 8
    _, alone = plain(x)
    _, beside = padded(torch.cat([x, 30 * random_input(2, 4, seed=7)], dim=1), None, absent)
    torch.testing.assert_close(beside.auxiliary, alone.auxiliary)
    plain.state.end_step()
    padded.state.end_step()
    torch.testing.assert_close(padded.state.balance_bias, plain.state.balance_bias)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shared_d_ff", [0, 8])
def test_a_token_without_experts_comes_out_unchanged(training: bool, shared_d_ff: int) -> None:
    """But for the shared expert."""
    layer = random_layer({"shared_d_ff": shared_d_ff, "capacity_factor": 0.5}).train(training)
    layer.state.threshold_total *= 1.5
    x = random_input(4, 12)
    out, routed = layer(x)
    chosen = chosen_by(layer, x.flatten(0, 1), "expert_choice" if training else "threshold", 4)
    alone = ~chosen.any(dim=1)
    assert int(routed.statistics.fan_out[0]) == int(alone.sum()) >= 5
    expected = layer.shared(x) if layer.shared is not None else torch.zeros_like(x)
    assert_close(out.flatten(0, 1)[alone], expected.flatten(0, 1)[alone])
    assert not torch.isclose(out, expected).all(-1).flatten()[~alone].any()


@torch.no_grad()
def test_a_token_that_no_layer_reads_keeps_its_residual() -> None:
    model = small_expert(kind="sparse", sparse=random_layer({}).sparse)
    for block in model.blocks:
        block.feed_forward.state.observe_kth_score(torch.full((4,), 2.0))
        block.feed_forward.state.end_step()  # no softmax gate reaches 2
    tokens, before = text_of(2, 6), []
    first = model.blocks[0]
    first.feed_forward_norm.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
    first.register_forward_hook(lambda _, inputs, outputs: before.append(outputs[0]))
    routed = model.read(tokens).routed
    assert [float(r.statistics.fan_out[0]) for r in routed] == [12, 12]
    assert torch.equal(before[0], before[1])


@torch.no_grad()
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_gates_are_not_renormalised_over_the_experts_of_a_token(gate: str) -> None:
    """Equal experts: the output is their common one times the sum of the gates taken."""
    layer = random_layer({"routing": "token_choice", "top_k": 2, "gate": gate}).eval()
    for weight in (layer.up.weight, layer.down.weight):
        weight.copy_(weight[:1].expand_as(weight))
    x = random_input(1, 5)
    tokens = x[0]
    taken = gates_of(layer, tokens) * chosen_by(layer, tokens, "threshold", 1)
    common = torch.stack([one_feed_forward(layer, 0, token) for token in tokens])
    assert_close(layer(x)[0][0], taken.sum(dim=1, keepdim=True) * common)
    assert float((taken.sum(dim=1) - 1).abs().max()) > 0.1


@torch.no_grad()
def test_half_precision_routes_in_float32() -> None:
    """The same tokens are chosen as by the same (rounded) weights in float32."""
    half = random_layer({"capacity_factor": 2.0}).to(torch.bfloat16).train()
    wide = random_layer({"capacity_factor": 2.0}).to(torch.bfloat16).float().train()
    x = random_input(4, 64).to(torch.bfloat16)
    out, _ = half(x)
    expected, _ = wide(x.float())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(half.state._kth_scores[0], wide.state._kth_scores[0], rtol=0, atol=0)
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
