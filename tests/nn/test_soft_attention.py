"""Attentions that all run, mixed by gates."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nn.small_experts import BOS, change_from, random_cuts, small_config, small_expert, text_of
from pyper.config import SparseConfig
from pyper.errors import ConfigError
from pyper.nn import KVCache, Transformer, count_parameters, flops_per_token, init_weights
from pyper.nn.attention import Attention, AttentionContext
from pyper.nn.rope import rotation
from pyper.nn.soft_attention import SoftAttention

SPARSE = SparseConfig(n_experts=3, attention_experts=3, routing="token_choice", top_k=2)
SHAPES: list[dict[str, Any]] = [
    {},
    {"n_kv_heads": 2, "qk_norm": True, "attention_bias": True},
    {"attend_across_documents": False},
]


def soft_expert(**changes: Any) -> Transformer:
    return small_expert(kind="sparse", sparse=SPARSE, **changes)


def plain_context(length: int) -> AttentionContext:
    cos, sin = rotation(torch.arange(length), 4, 10_000.0, None)
    return AttentionContext(cos.unsqueeze(-2), sin.unsqueeze(-2), None)


def a_layer() -> SoftAttention:
    layer = soft_expert().blocks[0].attention
    assert isinstance(layer, SoftAttention)
    return layer


@torch.no_grad()
def test_the_output_is_the_gated_sum() -> None:
    layer, x, context = a_layer(), torch.randn(2, 9, 16), plain_context(9)
    gates = (x @ layer.router.weight.T).softmax(dim=-1)
    expected = sum(gates[..., e, None] * layer.experts[e](x, context, 0) for e in range(3))
    torch.testing.assert_close(layer(x, context, 0), expected)


@torch.no_grad()
def test_a_decided_router_gives_the_output_of_its_expert() -> None:
    layer, x, context = a_layer(), torch.randn(2, 9, 16), plain_context(9)
    layer.router.weight *= 1e5
    best = layer.router(x).argmax(dim=-1)
    assert len(best.unique()) == 3
    own = torch.stack([expert(x, context, 0) for expert in layer.experts], dim=2)  # (B, T, E, D)
    expected = own.gather(2, best[..., None, None].expand(-1, -1, 1, 16)).squeeze(2)
    torch.testing.assert_close(layer(x, context, 0), expected)


@torch.no_grad()
def test_equal_attentions_in_half_precision_stay_one() -> None:
    layer = a_layer().to(torch.bfloat16)
    for expert in layer.experts[1:]:
        expert.load_state_dict(layer.experts[0].state_dict())
    x, context = torch.randn(2, 9, 16, dtype=torch.bfloat16), plain_context(9)
    torch.testing.assert_close(layer(x, context, 0), layer.experts[0](x, context, 0))


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("pieces", [[1] * 20, [20], [7, 1, 1, 11]])
@torch.no_grad()
def test_reading_in_pieces_equals_reading_at_once(
    changes: dict[str, Any], pieces: list[int]
) -> None:
    model, tokens = soft_expert(**changes), text_of(3, 20)
    tokens[:, 0] = BOS
    cache = KVCache.allocate(model.config, 3, 20, device=model.device, dtype=model.dtype)
    states = [model.extend(part, cache) for part in tokens.split(pieces, dim=1)]
    got: Tensor = model.head(torch.cat(states, dim=1))
    torch.testing.assert_close(got, model(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", SHAPES)
@torch.no_grad()
def test_later_tokens_change_nothing_before(changes: dict[str, Any]) -> None:
    model, tokens, cuts = soft_expert(**changes), text_of(50, 24), random_cuts(50, 24)
    changed = change_from(tokens, cuts)
    difference = (model(tokens) - model(changed)).abs().amax(dim=-1)
    before = torch.arange(24) < cuts[:, None]
    assert float(difference[before].max()) < 1e-5
    assert float(difference[~before].max()) > 0.1


def test_every_attention_counts() -> None:
    one = small_config(kind="sparse", sparse=SPARSE.model_copy(update={"attention_experts": 0}))
    three = small_config(kind="sparse", sparse=SPARSE)
    attention = sum(p.numel() for p in Attention(one, 0).parameters())
    more = 2 * (2 * attention + 3 * 16)  # in two layers: two more, and a router
    assert count_parameters(three) - count_parameters(one) == more
    scores = 4 * 2 * 10 * 16  # 4 · L · T · H·K of one attention
    assert flops_per_token(three, 10) - flops_per_token(one, 10) == 2 * more + 2 * scores


def test_each_attention_is_drawn_like_a_single_one() -> None:
    config = small_config(kind="sparse", sparse=SPARSE, d_model=64, d_ff=64, init_std=0.05)
    model = Transformer(config)
    init_weights(model, 0)
    experts = model.blocks[1].attention.experts
    for expert in experts:
        assert float(expert.out.weight.detach().std()) == pytest.approx(0.05 / 2, rel=0.05)
        assert float(expert.qkv.weight.detach().std()) == pytest.approx(0.05, rel=0.05)
    assert not torch.equal(experts[0].qkv.weight, experts[1].qkv.weight)
    router = model.blocks[1].attention.router.weight.detach()
    assert float(router.std()) == pytest.approx(0.05, rel=0.2)


def test_whole_transformers_bring_their_own() -> None:
    with pytest.raises(ConfigError, match="attention_experts"):
        small_config(kind="token_mixture", sparse=SparseConfig(attention_experts=8))
