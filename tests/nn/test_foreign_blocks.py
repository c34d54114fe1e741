"""What experts must be able to be for foreign weights: positions, norms and biases."""

import math
import warnings
from typing import Any

import pytest
import torch

from nn.small_experts import small_config, small_expert, text_of
from pyper.config import ExpertConfig, RopeScaling, SparseConfig
from pyper.errors import ConfigError
from pyper.merge import merge_experts
from pyper.nn import Transformer, count_parameters, flops_per_token
from pyper.nn.attention import AttentionContext
from pyper.nn.rope import attention_scale, inverse_frequencies

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

OLMO = {"norm_position": "post", "qk_norm": True, "qk_norm_over": "projection"}
LENGTH = "original_max_position_embeddings"
SCALINGS: list[dict[str, Any]] = [
    {},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "yarn", "factor": 4.0, LENGTH: 16},
    {"rope_type": "yarn", "factor": 1.0, LENGTH: 64},
    {"rope_type": "yarn", "factor": 7.0, LENGTH: 4096, "beta_fast": 20.0, "beta_slow": 2.0},
    {"rope_type": "yarn", "factor": 7.0, LENGTH: 4096, "truncate": False},
    {"rope_type": "yarn", "factor": 7.0, LENGTH: 4096, "mscale": 0.7, "mscale_all_dim": 1.1},
    {"rope_type": "yarn", "factor": 2.0, LENGTH: 100, "attention_factor": 1.3},
    {"rope_type": "llama3", "factor": 8.0, LENGTH: 8192, "low_freq_factor": 1.0}
    | {"high_freq_factor": 4.0},
    {"rope_type": "llama3", "factor": 32.0, LENGTH: 64, "low_freq_factor": 0.5}
    | {"high_freq_factor": 2.0},
]


def ours(theirs: dict[str, Any]) -> RopeScaling | None:
    names = {"rope_type": "kind", LENGTH: "original_seq_len"}
    values = {names.get(key, key): value for key, value in theirs.items()}
    return RopeScaling(**values) if values else None


@pytest.mark.parametrize("theirs", SCALINGS)
@pytest.mark.parametrize("head_dim", [4, 6, 64, 80, 128])
@pytest.mark.parametrize("theta", [50.0, 10_000.0, 500_000.0, 2_000_000.0])
def test_frequencies_are_those_of_transformers_to_the_last_bit(
    theirs: dict[str, Any], head_dim: int, theta: float
) -> None:
    transformers.logging.set_verbosity_error()
    config = transformers.LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": theta} | theirs,
    )
    reference = LlamaRotaryEmbedding(config)
    scaling = ours(theirs)
    got = inverse_frequencies(head_dim, theta, scaling, torch.device("cpu"))
    assert torch.equal(got, reference.inv_freq)
    assert attention_scale(scaling) == reference.attention_scaling


def test_a_layer_without_positions_sees_a_bag_of_tokens() -> None:
    tokens = text_of(1, 9)
    shuffled = torch.cat((tokens[:, :-1].flip(1), tokens[:, -1:]), dim=1)
    for layers, alike in (((0,), True), ((), False)):
        model = small_expert(n_layers=1, no_rope_layers=layers)
        with torch.no_grad():
            last, other = model(tokens)[:, -1], model(shuffled)[:, -1]
        assert torch.allclose(last, other, atol=1e-5) is alike


def test_post_norm_bounds_what_a_block_writes() -> None:
    model = small_expert(n_layers=1, **OLMO)
    block = model.blocks[0]
    with torch.no_grad():
        block.attention_norm.weight.fill_(0.0)
        block.feed_forward_norm.weight.fill_(2.0)
        block.feed_forward.down.weight.mul_(1000)
        tokens = text_of(1, 5)
        cos, sin = model._rotation(torch.arange(5))
        x = model.embedding(tokens)
        out, _ = block(x, AttentionContext(cos, sin, None), 0)
    rms = (out - x).square().mean(dim=-1).sqrt()
    torch.testing.assert_close(rms, torch.full_like(rms, 2.0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "changes", [OLMO, {"no_rope_layers": (0,)}, {"attention_output_bias": True}]
)
@pytest.mark.parametrize("sparse", [{}, {"attention_experts": 2}])
def test_sparse_layers_of_equal_experts_are_the_dense_model(
    changes: dict[str, Any], sparse: dict[str, Any]
) -> None:
    dense = small_expert(**changes)
    shape = SparseConfig(
        n_experts=2, routing="token_choice", top_k=2, normalize_gates=True, **sparse
    )
    merged = merge_experts([dense, dense], shape).eval()
    tokens = text_of(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens), dense(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n_kv_heads", [None, 2])
def test_counts_follow_norms_and_biases(n_kv_heads: int | None) -> None:
    plain = small_config(n_kv_heads=n_kv_heads)
    base, c = count_parameters(plain), plain
    q, k = c.n_heads * c.dim_per_head, c.kv_heads * c.dim_per_head
    for changes, more in (
        (OLMO, c.n_layers * (q + k)),
        ({"attention_output_bias": True}, c.n_layers * c.d_model),
        ({"no_rope_layers": (0, 1)}, 0),
    ):
        changed = small_config(n_kv_heads=n_kv_heads, **changes)
        assert count_parameters(changed) == base + more
        assert flops_per_token(changed, 10) == flops_per_token(plain, 10) + 2 * more
        assert sum(p.numel() for p in Transformer(changed).parameters()) == base + more


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"qk_norm_over": "projection"}, "qk_norm_over"),
        ({"norm_position": "post", "init": "zero_output"}, "norm_position"),
        ({"no_rope_layers": [2]}, "no_rope_layers"),
        ({"no_rope_layers": [-1]}, "no_rope_layers"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ({"no_rope_layers": [1, 1]}, "no_rope_layers"),
        *(
            (OLMO | change | {"kind": "token_mixture"}, key)
            for change, key in (({}, "qk_norm_over"), ({"qk_norm_over": "head"}, "norm_position"))
        ),
        ({"kind": "token_mixture", "no_rope_layers": [0]}, "no_rope_layers"),
        ({"kind": "token_mixture", "attention_output_bias": True}, "attention_output_bias"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"`model.{named}") as caught:
        ExpertConfig(**{"d_model": 16, "n_heads": 4, "n_layers": 2} | changes)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"kind": "dynamic"}, "dynamic"),
        ({"kind": "linear", "beta_fast": 3.0}, "beta_fast"),
        ({"kind": "llama3", "mscale": 1.0, "mscale_all_dim": 1.0}, "mscale"),
        ({"kind": "yarn", "mscale": 1.0}, "mscale_all_dim"),
        ({"kind": "yarn", "beta_fast": 1.0}, "beta_slow"),
        ({"kind": "llama3", "low_freq_factor": 4.0}, "high_freq_factor"),
    ],
)
def test_keys_of_a_scaling_belong_to_its_kind(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        RopeScaling(**{"factor": 2.0} | values)
    assert caught.value.hint


@pytest.mark.parametrize("factor", [0.5, math.nan, math.inf])
def test_a_factor_stretches(factor: float) -> None:
    with pytest.raises(ConfigError, match="`factor`"):
        RopeScaling(kind="linear", factor=factor)
