"""Whole transformers in one batch against a loop over experts, sequences, documents and tokens."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nn.small_experts import BOS, small_expert, text_of
from pyper.config import SparseConfig
from pyper.nn import Reading, Transformer
from pyper.nn.documents import document_ids, positions
from pyper.nn.expert_stack import ExpertStack, StackedBlock
from pyper.nn.rope import rotation

SHAPES: list[dict[str, Any]] = [
    {},
    {"n_kv_heads": 2, "qk_norm": True, "attention_bias": True},
    {"activation": "swiglu", "feed_forward_bias": True, "n_layers": 3},
    {"attend_across_documents": False, "n_kv_heads": 1},
]


def stacked(sparse: dict[str, Any] | None = None, **changes: Any) -> Transformer:
    """In float64, with thresholds in the midst of the scores."""
    settings = SparseConfig(**{"n_experts": 3, "stem_layers": 1} | (sparse or {}))
    model = small_expert(kind="token_mixture", sparse=settings, **changes).double()
    with torch.no_grad():
        _, x = read(model, text_of(4, 12, seed=50))
        scores = _scores(model.experts, x).flatten(0, 1)
        model.experts.state.observe_kth_score(scores.quantile(0.6, dim=0).float())
        model.end_step()
    return model


def read(model: Transformer, tokens: Tensor, **options: Any) -> tuple[Reading, Tensor]:
    """What the model reads, and what came to its experts."""
    seen: list[Tensor] = []
    hook = model.experts.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    reading = model.read(tokens, **options)
    hook.remove()
    return reading, seen[0]


def pool_of(batch: int = 3, length: int = 12, seed: int = 0) -> Tensor:
    """No two states are equal: rows begin differently, and one document alone begins inside."""
    tokens = text_of(batch, length, seed=seed)
    tokens[:, 0] = torch.arange(1, batch + 1)
    tokens[1, length // 2] = BOS
    return tokens


def _gates(stack: ExpertStack, x: Tensor) -> Tensor:
    logits = x @ stack.router.weight.T
    return logits.softmax(dim=-1) if stack.sparse.gate == "softmax" else logits.sigmoid()


def _scores(stack: ExpertStack, x: Tensor) -> Tensor:
    return _gates(stack, x) if stack.sparse.gate == "softmax" else x @ stack.router.weight.T


def _normed(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return gain * x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads x (H, K) by the angles of one position, as complex numbers."""
    half = x.shape[-1] // 2
    pair = torch.complex(x[:, :half], x[:, half:])
    turn = torch.complex(cos[:half], sin[half:]).to(pair.dtype)
    return torch.cat([(pair * turn).real, (pair * turn).imag], dim=-1)


def _one_block(layer: StackedBlock, e: int, x: Tensor, where: Tensor, sees: Tensor) -> Tensor:
    """Block of expert e over its tokens x (n, D) at positions `where`; sees (n, n) bool."""
    H, G, K = layer.n_heads, layer.n_kv_heads, layer.widths[0] // layer.n_heads
    qkv = torch.einsum(
        "nd,od->no", _normed(x, layer.attention_norm[e], layer.eps), layer.qkv.weight[e]
    )
    if layer.qkv.bias is not None:
        qkv = qkv + layer.qkv.bias[e]
    query, key, value = (part.view(len(x), -1, K) for part in qkv.split(layer.widths, dim=-1))
    if layer.q_norm is not None:
        query = _normed(query, layer.q_norm[e], layer.eps)
        key = _normed(key, layer.k_norm[e], layer.eps)
    cos, sin = rotation(where, K, 10_000.0, None)
    query = torch.stack([_turned(*row) for row in zip(query, cos, sin, strict=True)])
    key = torch.stack([_turned(*row) for row in zip(key, cos, sin, strict=True)])
    key, value = (t.repeat_interleave(H // G, dim=1) for t in (key, value))
    scores = torch.einsum("nhk,mhk->hnm", query, key) / K**0.5
    probs = scores.masked_fill(~sees, -torch.inf).softmax(dim=-1)
    mixed = torch.einsum("hnm,mhk->nhk", probs, value).flatten(1)
    x = x + torch.einsum("nk,dk->nd", mixed, layer.out.weight[e])
    up = torch.einsum(
        "nd,fd->nf", _normed(x, layer.feed_forward_norm[e], layer.eps), layer.up.weight[e]
    )
    up = up if layer.up.bias is None else up + layer.up.bias[e]
    if layer.activation == "swiglu":
        gate, content = up.chunk(2, dim=-1)
        hidden = F.silu(gate) * content
    else:
        hidden = F.gelu(up)
    down = torch.einsum("nf,df->nd", hidden, layer.down.weight[e])
    return x + (down if layer.down.bias is None else down + layer.down.bias[e])


def naive(model: Transformer, tokens: Tensor, x: Tensor, chosen: Tensor) -> Tensor:
    """Final states of what came to the experts, x; chosen (E, B, T). One expert and one row at a
    time."""
    stack = model.experts
    apart = not model.config.attend_across_documents
    group = document_ids(tokens, BOS) if apart else torch.zeros_like(tokens)
    where = positions(tokens, BOS) if apart else torch.arange(tokens.shape[1]).expand_as(tokens)
    gates, out = _gates(stack, x), x
    for e in range(stack.sparse.n_experts):
        for b in range(len(tokens)):
            mine = chosen[e, b].nonzero().flatten()
            if not len(mine):
                continue
            sees = (group[b, mine][:, None] == group[b, mine]) & (mine[:, None] >= mine)
            states = x[b, mine]
            for layer in stack.layers:
                states = _one_block(layer, e, states, where[b, mine], sees)
            change = gates[b, mine, e, None] * (states - x[b, mine])
            out = out.index_put((torch.tensor(b), mine), change, accumulate=True)
    return _normed(out, model.norm.weight, model.config.norm_eps)


def chosen_by(model: Transformer, x: Tensor, by_threshold: bool) -> Tensor:
    """(E, B, T) bool."""
    scores, sparse = _scores(model.experts, x).detach(), model.config.routing
    if by_threshold:
        return (scores > model.experts.state.threshold).permute(2, 0, 1)
    n_tokens = scores.shape[0] * scores.shape[1]
    capacity = int(sparse.capacity_factor * n_tokens / sparse.n_experts)
    chosen = torch.zeros(sparse.n_experts, n_tokens, dtype=torch.bool)
    for e, column in enumerate(scores.flatten(0, 1).T.tolist()):
        chosen[e, sorted(range(n_tokens), key=lambda n: -column[n])[:capacity]] = True
    return chosen.view(-1, *scores.shape[:2])


def gradients(model: Transformer, states: Tensor) -> dict[str, Tensor]:
    weight = torch.randn(states.shape, generator=torch.Generator().manual_seed(3)).double()
    named = {name: p for name, p in model.named_parameters() if name != "head.weight"}
    found = torch.autograd.grad((states * weight).sum(), list(named.values()), retain_graph=True)
    return dict(zip(named, found, strict=True))


def assert_close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("sparse", [{}, {"gate": "sigmoid", "capacity_factor": 2.0}])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", ["expert_choice", "threshold", "training by threshold"])
def test_the_stack_equals_one_expert_after_another(
    shape: dict[str, Any], sparse: dict[str, Any], rule: str
) -> None:
    """Values, and the gradient of every parameter, those below the experts included."""
    own = {"routing": "threshold"} if rule == "training by threshold" else {}
    model = stacked(sparse | own, **shape).train(rule != "threshold")
    model.begin_step(0.5)
    tokens = pool_of()
    reading, x = read(model, tokens)
    chosen = chosen_by(model, x, by_threshold=rule != "expert_choice")
    assert 0 < int(chosen.sum()) < chosen.numel()
    assert reading.routed[0].statistics.expert_load.tolist() == chosen.sum(dim=(1, 2)).tolist()
    expected = naive(model, tokens, x, chosen)
    assert_close(reading.states, expected)
    theirs = gradients(model, expected)
    for name, gradient in gradients(model, reading.states).items():
        assert_close(gradient, theirs[name])
        assert float(gradient.abs().max()) > 0


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(2, 4),
    length=st.integers(2, 9),
    n_experts=st.integers(2, 4),
    capacity_factor=st.floats(0.3, 2.0),
    more=st.integers(0, 4),
    seed=st.integers(0, 3),
)
@torch.no_grad()
def test_each_expert_takes_exactly_its_capacity_and_padding_changes_nothing(
    batch: int, length: int, n_experts: int, capacity_factor: float, more: int, seed: int
) -> None:
    capacity = int(capacity_factor * batch * length / n_experts + 1e-6)
    assume(capacity >= 1)
    sparse = {"n_experts": n_experts, "capacity_factor": capacity_factor}
    model, tokens = stacked(sparse).train(), pool_of(batch, length, seed)
    reading, _ = read(model, tokens)
    assert reading.routed[0].statistics.expert_load.tolist() == [capacity] * n_experts
    padded = torch.cat([tokens, text_of(batch, more, seed=8)], dim=1)
    absent = torch.arange(length + more).expand(batch, -1) >= length
    with_padding, _ = read(model, padded, padding=absent)
    assert_close(with_padding.states[:, :length], reading.states)
    for name, value in vars(reading.routed[0].statistics).items():
        torch.testing.assert_close(getattr(with_padding.routed[0].statistics, name), value)


@torch.no_grad()
def test_a_token_attends_to_those_of_its_expert_and_its_sequence_only() -> None:
    """Change what another token brings to the experts: only where both were chosen, and after."""
    model, tokens = stacked(), pool_of()
    _, x = read(model, tokens)
    chosen = chosen_by(model, x, by_threshold=True)
    length = tokens.shape[1]
    for row, at in [(0, 2), (1, 4), (2, 0), (2, 6)]:
        moved = x.clone()
        # Along a direction that no router reads: the choice stays the same, its content changes.
        null = torch.linalg.svd(model.experts.router.weight, full_matrices=True).Vh[-1]
        moved[row, at] += 3 * null
        same_expert = chosen[:, row, at].unsqueeze(-1) & chosen[:, row]  # (E, T)
        expected = torch.zeros(tokens.shape, dtype=torch.bool)
        expected[row] = same_expert.any(dim=0) & (torch.arange(length) > at)
        expected[row, at] = True
        states = [_through(model, tokens, y) for y in (x, moved)]
        assert torch.equal((states[0] - states[1]).abs().amax(dim=-1) > 1e-9, expected)


def _through(model: Transformer, tokens: Tensor, x: Tensor) -> Tensor:
    hook = model.experts.register_forward_pre_hook(lambda _, inputs: (x, *inputs[1:]))
    states = model.read(tokens).states
    hook.remove()
    return states


@torch.no_grad()
def test_a_token_that_no_expert_reads_keeps_its_state() -> None:
    model, tokens = stacked(), pool_of()
    model.experts.state.threshold_total *= 1.3
    reading, x = read(model, tokens)
    alone = ~chosen_by(model, x, by_threshold=True).any(dim=0)
    assert int(reading.routed[0].statistics.fan_out[0]) == int(alone.sum()) > 0
    assert_close(reading.states[alone], model.norm(x)[alone])
    model.experts.state.threshold_total.fill_(2.0)  # no softmax gate reaches that
    reading, x = read(model, tokens)
    assert_close(reading.states, model.norm(x))


@torch.no_grad()
def test_documents_apart_read_as_if_each_were_alone() -> None:
    model = stacked(attend_across_documents=False)
    first, second = pool_of(2, 9, seed=1), pool_of(2, 7, seed=2)
    first[1, 4], second[1, 3] = 5, 6
    first[:, 0] = second[:, 0] = BOS
    together = model.read(torch.cat([first, second], dim=1)).states
    assert_close(together[:, :9], model.read(first).states)
    assert_close(together[:, 9:], model.read(second).states)


@torch.no_grad()
def test_statistics_tell_how_far_thresholds_are_from_the_choice() -> None:
    model = stacked().train()
    reading, x = read(model, pool_of())
    statistics = reading.routed[0].statistics
    kth = model.experts.state._kth_scores[0]
    gap = (kth - model.experts.state.threshold).abs().mean()
    torch.testing.assert_close(float(statistics.threshold_gap), float(gap))
    flips = chosen_by(model, x, by_threshold=False) ^ chosen_by(model, x, by_threshold=True)
    torch.testing.assert_close(float(statistics.flip_rate), float(flips.double().mean()))
