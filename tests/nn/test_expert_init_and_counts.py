import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nn.small_experts import small_config, text_of
from pyper.config import ExpertConfig
from pyper.nn import (
    Transformer,
    count_parameters,
    flops_per_token,
    init_weights,
    train_flops_per_token,
)


def initialised(seed: int = 0, **changes: Any) -> Transformer:
    model = Transformer(small_config(**changes))
    init_weights(model, seed)
    return model


def test_a_seed_gives_the_same_weights_and_another_seed_others() -> None:
    first, again, other = initialised(1), initialised(1), initialised(2)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
        if weight.ndim == 2:
            assert not torch.equal(weight, other.state_dict()[name])


def test_weights_are_independent_of_what_was_drawn_before() -> None:
    torch.manual_seed(5)
    first = initialised()
    torch.rand(7)
    for mine, other in zip(first.parameters(), initialised().parameters(), strict=True):
        assert torch.equal(mine, other)


def test_scaled_normal_has_the_documented_scales() -> None:
    model = initialised(
        d_model=128, d_ff=256, vocab_size=200, n_layers=3, init_std=0.05, attention_bias=True
    )
    for name, weight in model.state_dict().items():
        if name.endswith("bias"):
            assert (weight == 0).all()
        elif weight.ndim == 1:
            assert (weight == 1).all()
        else:
            output = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
            expected = 0.05 / math.sqrt(6) if output else 0.05
            assert float(weight.std()) == pytest.approx(expected, rel=0.03)
            assert float(weight.mean()) == pytest.approx(0, abs=expected / 20)


def test_zero_output_starts_as_the_identity() -> None:
    model = initialised(d_model=128, d_ff=256, vocab_size=200, init="zero_output")
    tokens = text_of(2, 9)
    with torch.no_grad():
        assert torch.equal(model.hidden(tokens), model.norm(model.embedding(tokens)))
        assert (model(tokens) == 0).all()
    block = model.blocks[0]
    for linear in (block.attention.qkv, block.feed_forward.up):
        assert float(linear.weight.detach().std()) == pytest.approx(1 / math.sqrt(128), rel=0.03)
    assert float(model.embedding.weight.detach().std()) == pytest.approx(0.02, rel=0.03)


def test_a_new_expert_predicts_about_uniformly() -> None:
    model, tokens = initialised(), text_of(4, 30)
    with torch.no_grad():
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert float(loss) == pytest.approx(math.log(17), abs=0.05)


def test_tied_embeddings_are_one_matrix() -> None:
    model = initialised(tie_embeddings=True)
    assert model.head.weight is model.embedding.weight
    assert count_parameters(model.config) == count_parameters(small_config()) - 17 * 16
    model(text_of(1, 5)).sum().backward()
    assert model.embedding.weight.grad is not None
    zeros = initialised(tie_embeddings=True, init="zero_output")
    assert float(zeros.embedding.weight.detach().std()) > 0.01  # not zeroed as the head would be


SHAPES = [
    {
        "activation": activation,
        "n_kv_heads": n_kv_heads,
        "head_dim": head_dim,
        "qk_norm": flag,
        "attention_bias": flag,
        "feed_forward_bias": not flag,
        "tie_embeddings": tied,
    }
    for activation, n_kv_heads, head_dim, flag, tied in itertools.product(
        ("gelu", "swiglu"), (None, 2), (None, 6), (True, False), (True, False)
    )
]


def naive_count(c: ExpertConfig) -> int:
    width, kv_width = c.n_heads * c.dim_per_head, c.kv_heads * c.dim_per_head
    ups = 2 if c.activation == "swiglu" else 1
    attention = c.d_model * (width + 2 * kv_width) + width * c.d_model
    attention += (width + 2 * kv_width) * c.attention_bias + 2 * c.dim_per_head * c.qk_norm
    feed_forward = (ups + 1) * c.d_model * c.ff_dim
    feed_forward += (ups * c.ff_dim + c.d_model) * c.feed_forward_bias
    tables = c.vocab_size * c.d_model * (1 if c.tie_embeddings else 2)
    return tables + c.d_model + c.n_layers * (attention + feed_forward + 2 * c.d_model)


@pytest.mark.parametrize("changes", SHAPES)
def test_counts_are_those_of_the_real_module(changes: dict[str, Any]) -> None:
    config = small_config(**changes)
    real = sum(p.numel() for p in Transformer(config).parameters())
    assert count_parameters(config) == real == naive_count(config)


def test_eight_experts_of_the_large_shape_hold_twelve_billion() -> None:
    config = ExpertConfig(d_model=2048, n_layers=28, n_heads=16, d_ff=8192, vocab_size=32_768)
    count = count_parameters(config)
    assert round(count / 1e9, 2) == 1.54
    assert round(8 * count / 1e9, 2) == 12.35


@pytest.mark.parametrize("tied", [True, False])
def test_operations_follow_the_documented_formula(tied: bool) -> None:
    config = small_config(tie_embeddings=tied, head_dim=6, n_kv_heads=2)
    # Every weight but the input table multiplies each token once; a tied table is also the head.
    multiplied = count_parameters(small_config(tie_embeddings=True, head_dim=6, n_kv_heads=2))
    attention = 4 * config.n_layers * 10 * (config.n_heads * 6)
    assert flops_per_token(config, 10) == 2 * multiplied + attention
    assert train_flops_per_token(config, 10) == 3 * flops_per_token(config, 10)
