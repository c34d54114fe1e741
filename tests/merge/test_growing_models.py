"""Upcycling one dense model, and one more expert in a merged one."""

from typing import Any

import pytest
import torch

from merge.small_merges import (
    SHAPES,
    assert_close,
    branches,
    domains,
    randomize_routers,
    token_choice,
)
from nn.small_experts import small_expert, text_of
from pyper.config import SparseConfig
from pyper.errors import CheckpointError, ConfigError, DataError, TokenizerError
from pyper.merge import add_expert, fit_router_ridge, merge_experts, upcycle


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize(
    "sparse", [token_choice(top_k=1), token_choice(attention_experts=3), SparseConfig(n_experts=3)]
)
@torch.no_grad()
def test_upcycling_without_noise_is_the_dense_model(
    sparse: SparseConfig, changes: dict[str, Any]
) -> None:
    dense, tokens = small_expert(**changes), text_of(3, 20)
    assert_close(upcycle(dense, sparse, 0.0, 1)(tokens), dense(tokens))


def test_noise_is_relative_to_the_size_of_each_matrix() -> None:
    dense = small_expert(d_model=64, d_ff=96, feed_forward_bias=True)
    with torch.no_grad():
        dense.blocks[1].feed_forward.up.weight *= 100
    model = upcycle(dense, token_choice(4), 0.25, 3)
    for block, source in zip(model.blocks, dense.blocks, strict=True):
        for name in ("up", "down"):
            old = getattr(source.feed_forward, name)
            new = getattr(block.feed_forward, name)
            noise = (new.weight - old.weight).detach()
            rms = float(old.weight.detach().square().mean().sqrt())
            assert float(noise.std()) == pytest.approx(0.25 * rms, rel=0.05)
            assert not torch.equal(noise[0], noise[1])
            assert torch.equal(new.bias, old.bias.expand_as(new.bias))
        assert torch.equal(block.attention.qkv.weight, source.attention.qkv.weight)


def test_upcycling_is_the_same_for_the_same_seed() -> None:
    dense = small_expert()
    first, again, other = (upcycle(dense, token_choice(), 0.1, seed) for seed in (1, 1, 2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
        if name.endswith(("feed_forward.up.weight", "router.weight")):
            assert not torch.equal(tensor, other.state_dict()[name])


def test_negative_noise_is_refused() -> None:
    with pytest.raises(ConfigError, match="noise_std"):
        upcycle(small_expert(), token_choice(), -0.1, 0)


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize(
    "sparse", [token_choice(top_k=1), token_choice(top_k=1, gate="sigmoid", every=2)]
)
@torch.no_grad()
def test_an_added_expert_that_reads_nothing_changes_nothing(
    sparse: SparseConfig, changes: dict[str, Any]
) -> None:
    *experts, new = branches(4, **changes)
    merged, tokens = merge_experts(experts, sparse), text_of(3, 20)
    randomize_routers(merged)
    larger = add_expert(merged, new)
    assert larger.config.routing.n_experts == 4
    for routed in larger.read(tokens).routed:
        assert routed.statistics.expert_load[3] == 0
    assert_close(larger(tokens), merged(tokens))


@torch.no_grad()
def test_with_sigmoid_gates_an_unread_expert_leaves_expert_choice_as_it_was() -> None:
    *experts, new = branches(4)
    merged = merge_experts(experts, SparseConfig(n_experts=3, gate="sigmoid"))
    tokens = text_of(3, 20)
    fit_router_ridge(merged, domains())
    larger = add_expert(merged, new)
    for block in larger.blocks:
        block.feed_forward.state.threshold_total[3] = 1e4
    assert_close(larger(tokens), merged(tokens))


@pytest.mark.parametrize("with_samples", [False, True])
@pytest.mark.parametrize(
    "sparse", [token_choice(), SparseConfig(n_experts=3), token_choice(attention_experts=3)]
)
def test_what_was_there_stays_bit_for_bit(sparse: SparseConfig, with_samples: bool) -> None:
    *experts, new = branches(4, feed_forward_bias=True)
    merged = merge_experts(experts, sparse)
    fit_router_ridge(merged, domains())
    before = {n: t.clone() for n, t in merged.state_dict().items()}
    larger = add_expert(merged, new, samples=domains(4) if with_samples else None)
    after = larger.state_dict()
    for name, tensor in before.items():
        kept = after[name][:3] if tensor.shape != after[name].shape else after[name]
        assert torch.equal(kept, tensor), name
        assert torch.equal(merged.state_dict()[name], tensor), name
    down = larger.blocks[0].feed_forward.down
    assert torch.equal(down.weight[3], new.blocks[0].feed_forward.down.weight)
    assert torch.equal(down.bias[3], new.blocks[0].feed_forward.down.bias)


@pytest.mark.parametrize("sparse", [token_choice(top_k=1), SparseConfig(n_experts=3)])
@torch.no_grad()
def test_samples_bring_the_new_expert_its_domain(sparse: SparseConfig) -> None:
    *experts, new = branches(4, d_model=64)
    samples = domains(4, rows=40)
    merged = merge_experts(experts, sparse)
    fit_router_ridge(merged, samples[:3])
    larger = add_expert(merged, new, samples=samples)
    own = larger.read(samples[3]).routed
    others = larger.read(torch.cat(samples[:3])).routed
    for at_home, abroad in zip(own, others, strict=True):
        home, away = at_home.statistics, abroad.statistics
        assert home.expert_load[3] / home.n_tokens > 0.8
        assert away.expert_load[3] / away.n_tokens < 0.2
    if sparse.is_expert_choice:
        for before, after in zip(merged.blocks, larger.blocks, strict=True):
            threshold = after.feed_forward.state.threshold
            assert threshold.isfinite().all()
            assert torch.equal(threshold[:3], before.feed_forward.state.threshold)


def test_experts_that_do_not_fit_are_not_added() -> None:
    merged = merge_experts(branches(2))
    with pytest.raises(CheckpointError, match="d_ff"):
        add_expert(merged, small_expert(d_ff=32))
    with pytest.raises(TokenizerError, match="vocab_size"):
        add_expert(merged, small_expert(vocab_size=19))
    with pytest.raises(ConfigError, match="only dense"):
        add_expert(merged, merged)
    with pytest.raises(ConfigError, match="sparse models"):
        add_expert(small_expert(), small_expert())
    with pytest.raises(DataError, match="3 experts need as many samples"):
        add_expert(merged, small_expert(), samples=domains(2))
