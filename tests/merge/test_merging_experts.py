"""Merged models equal what they were made of, where they should."""

from pathlib import Path
from typing import Any

import pytest
import torch

from merge.small_merges import (
    SHAPES,
    assert_close,
    branches,
    domains,
    force_routers,
    randomize_routers,
    small_copy,
    token_choice,
)
from nn.small_experts import small_expert, text_of
from pyper.checkpoint import write_tensors
from pyper.config import SparseConfig
from pyper.errors import CheckpointError, ConfigError, TokenizerError
from pyper.merge import (
    average_weights,
    fit_router_ridge,
    merge_experts,
    merged_sparse_config,
)
from pyper.mixture import load_expert
from pyper.mixture.expert_folder import model_tensors
from pyper.nn import Transformer

# Gates of a token's experts sum to one in these, and only these.
NEUTRAL = [
    token_choice(top_k=1),
    token_choice(top_k=2),
    token_choice(top_k=2, gate="sigmoid"),
    token_choice(top_k=3, normalize_gates=False),
    SparseConfig(n_experts=3),  # softmax gates, no threshold yet: every expert reads every token
    SparseConfig(n_experts=3, attention_experts=3),
    token_choice(top_k=1, attention_experts=3),
    token_choice(top_k=1, every=2),
]


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("sparse", NEUTRAL)
@torch.no_grad()
def test_identical_experts_give_the_logits_of_their_seed(
    sparse: SparseConfig, changes: dict[str, Any]
) -> None:
    seed, tokens = small_expert(**changes), text_of(3, 20)
    merged = merge_experts([small_copy(seed) for _ in range(3)], sparse)
    assert_close(merged(tokens), seed(tokens))
    randomize_routers(merged)
    assert_close(merged(tokens), seed(tokens))


@torch.no_grad()
def test_gates_that_do_not_sum_to_one_scale_the_output() -> None:
    seed, tokens = small_expert(n_layers=1), text_of(2, 9)
    merged = merge_experts([seed, seed], token_choice(2, 1, normalize_gates=False))
    x = torch.randn(2, 9, 16)
    dense, sparse = seed.blocks[0].feed_forward(x), merged.blocks[0].feed_forward(x)[0]
    assert_close(sparse, dense / 2)  # routers are zero: both gates are ½
    assert not torch.allclose(merged(tokens), seed(tokens), atol=1e-2)


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("expert", range(3))
@torch.no_grad()
def test_one_hot_routing_and_an_unaveraged_rest_are_that_expert(
    expert: int, changes: dict[str, Any]
) -> None:
    experts, tokens = branches(**changes), text_of(3, 20)
    merged = merge_experts(experts, token_choice(top_k=1))
    force_routers(merged, expert)
    assert not torch.allclose(merged(tokens), experts[expert](tokens), atol=1e-2)
    own = model_tensors(experts[expert])
    merged.load_state_dict(
        {name: t for name, t in own.items() if "feed_forward." not in name}, strict=False
    )
    assert_close(merged(tokens), experts[expert](tokens))


def test_attentions_are_kept_where_that_is_asked_for() -> None:
    experts = branches(qk_norm=True, attention_bias=True)
    merged = merge_experts(experts, token_choice(attention_experts=3))
    for layer, block in enumerate(merged.blocks):
        for kept, expert in zip(block.attention.experts, experts, strict=True):
            own = expert.blocks[layer].attention.state_dict()
            assert kept.state_dict().keys() == own.keys()
            assert all(torch.equal(t, own[n]) for n, t in kept.state_dict().items())


@torch.no_grad()
def test_the_rest_is_the_mean_in_the_dtype_of_the_experts() -> None:
    experts = [expert.to(torch.bfloat16) for expert in branches(3)]
    merged = merge_experts(experts, token_choice())
    assert merged.dtype == torch.bfloat16
    assert merged.blocks[0].feed_forward.state.threshold_total.dtype == torch.float32
    exact = torch.stack([e.embedding.weight.float() for e in experts]).mean(dim=0)
    assert torch.equal(merged.embedding.weight, exact.to(torch.bfloat16))
    for number, expert in enumerate(experts):
        up = merged.blocks[1].feed_forward.up.weight[number]
        assert torch.equal(up, expert.blocks[1].feed_forward.up.weight)


def test_experts_stay_as_they_are() -> None:
    experts = branches()
    before = [small_copy(expert).state_dict() for expert in experts]
    merged = merge_experts(experts)
    fit_router_ridge(merged, domains())
    for expert, state in zip(experts, before, strict=True):
        assert all(torch.equal(t, state[n]) for n, t in expert.state_dict().items())


def test_the_default_is_token_choice_with_normalised_gates() -> None:
    sparse = merge_experts(branches()).config.routing
    assert sparse == merged_sparse_config(3)
    assert (sparse.routing, sparse.top_k, sparse.normalize_gates) == ("token_choice", 2, True)


@torch.no_grad()
def test_average_weights_is_one_dense_model() -> None:
    experts, tokens = branches(2, tie_embeddings=True), text_of(2, 9)
    average = average_weights(experts)
    assert average.config == experts[0].config
    expected = small_copy(experts[0])
    expected.load_state_dict(
        {n: (t + experts[1].state_dict()[n]) / 2 for n, t in expected.state_dict().items()}
    )
    assert_close(average(tokens), expected(tokens))
    assert average.head.weight is average.embedding.weight


@pytest.mark.parametrize(
    "sparse",
    [
        token_choice(),
        SparseConfig(n_experts=3),
        SparseConfig(n_experts=3, routing="capped", gate="sigmoid"),
        token_choice(attention_experts=3),
    ],
)
@torch.no_grad()
def test_a_merged_model_survives_its_folder(sparse: SparseConfig, tmp_path: Path) -> None:
    merged, tokens = merge_experts(branches(), sparse), text_of(3, 20)
    fit_router_ridge(merged, domains())
    (tmp_path / "config.json").write_text(merged.config.model_dump_json())
    write_tensors(tmp_path / "model.safetensors", model_tensors(merged))
    loaded = load_expert(tmp_path, device=torch.device("cpu"), verify=False)
    assert torch.equal(loaded(tokens), merged(tokens))
    for ours, theirs in zip(merged.blocks, loaded.blocks, strict=True):
        state, other = ours.feed_forward.state, theirs.feed_forward.state
        assert torch.equal(state.threshold, other.threshold)
        assert bool(state.threshold.isfinite().all()) == sparse.is_expert_choice


@pytest.mark.parametrize(
    ("changes", "error", "key"),
    [
        ({"vocab_size": 18}, TokenizerError, "vocab_size"),
        ({"bos_id": 3}, TokenizerError, "bos_id"),
        ({"d_ff": 32}, CheckpointError, "d_ff"),
        ({"activation": "relu2"}, CheckpointError, "activation"),
        ({"rope_theta": 5e5}, CheckpointError, "rope_theta"),
        ({"kind": "sparse"}, ConfigError, "sparse"),
    ],
)
def test_experts_that_do_not_fit_are_refused(
    changes: dict[str, Any], error: type[Exception], key: str
) -> None:
    with pytest.raises(error, match=key) as refusal:
        merge_experts([small_expert(), small_expert(**changes)])
    assert refusal.value.hint  # type: ignore[attr-defined]


def test_a_default_that_is_written_out_is_no_difference() -> None:
    merge_experts([small_expert(), small_expert(n_kv_heads=4, head_dim=4, init="zero_output")])


@pytest.mark.parametrize(
    "sparse",
    [token_choice(4), token_choice(shared_d_ff=8), token_choice(attention_experts=2)],
)
def test_settings_that_do_not_fit_are_refused(sparse: SparseConfig) -> None:
    with pytest.raises(ConfigError) as refusal:
        merge_experts(branches(), sparse)
    assert refusal.value.hint


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_experts_are_refused(n: int) -> None:
    with pytest.raises(ConfigError):
        merge_experts(branches(n))


def test_normalised_gates_belong_to_token_choice() -> None:
    with pytest.raises(ConfigError, match="normalize_gates"):
        SparseConfig(normalize_gates=True)


def test_padding_has_no_part_in_normalised_gates() -> None:
    merged, tokens = merge_experts(branches()), text_of(2, 12)
    randomize_routers(merged)
    merged.train()
    padding = torch.zeros(2, 12, dtype=torch.bool)
    padding[:, 9:] = True
    states = merged.read(tokens, padding=padding).states
    states[:, :9].sum().backward()
    assert states.isfinite().all()
    assert all(p.grad.isfinite().all() for p in merged.parameters() if p.grad is not None)


def test_everything_but_the_head_learns_through_a_merged_model() -> None:
    merged: Transformer = merge_experts(branches(), token_choice(attention_experts=3)).train()
    randomize_routers(merged)
    merged.hidden(text_of(4, 20)).square().sum().backward()
    silent = {n for n, p in merged.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent <= {"head.weight", "embedding.weight"}
