"""The default experts are stock architectures: equal weights give equal logits."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from nn.small_experts import small_expert, text_of
from pyper.config import RopeScaling
from pyper.nn import Transformer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from transformers import PreTrainedModel

ATTENTION = ("q_proj", "k_proj", "v_proj")


def stock_twin(model: Transformer, family: str, **extra: Any) -> PreTrainedModel:
    """The model of `transformers` with our shape and our weights."""
    config = model.config
    settings = getattr(transformers, f"{family}Config")(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.ff_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.dim_per_head,
        max_position_embeddings=config.seq_len,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        bos_token_id=0,
        eos_token_id=0,
        **{"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}} | extra,
    )
    twin = getattr(transformers, f"{family}ForCausalLM")(settings).eval()
    twin.load_state_dict(stock_names(model), strict=not config.tie_embeddings)
    return twin


def stock_names(model: Transformer) -> dict[str, Tensor]:
    """Our weights by the names of `transformers`: q, k, v and gate, value are stacked by rows."""
    own = model.state_dict()
    twin = {
        "model.embed_tokens.weight": own["embedding.weight"],
        "model.norm.weight": own["norm.weight"],
    }
    if not model.config.tie_embeddings:
        twin["lm_head.weight"] = own["head.weight"]
    for layer, block in enumerate(model.blocks):
        there, here = f"model.layers.{layer}.", f"blocks.{layer}."
        twin[there + "input_layernorm.weight"] = own[here + "attention_norm.weight"]
        twin[there + "post_attention_layernorm.weight"] = own[here + "feed_forward_norm.weight"]
        twin[there + "self_attn.o_proj.weight"] = own[here + "attention.out.weight"]
        for kind in ("weight", "bias"):
            if f"{here}attention.qkv.{kind}" in own:
                parts = own[f"{here}attention.qkv.{kind}"].split(block.attention.widths)
                for name, part in zip(ATTENTION, parts, strict=True):
                    twin[f"{there}self_attn.{name}.{kind}"] = part
            twin |= _feed_forward(own, here, there, kind, model.config.activation)
        for name in ("q_norm", "k_norm"):
            if f"{here}attention.{name}.weight" in own:
                twin[f"{there}self_attn.{name}.weight"] = own[f"{here}attention.{name}.weight"]
    return twin


def _feed_forward(
    own: dict[str, Tensor], here: str, there: str, kind: str, activation: str
) -> dict[str, Tensor]:
    if f"{here}feed_forward.up.{kind}" not in own:
        return {}
    up, down = own[f"{here}feed_forward.up.{kind}"], own[f"{here}feed_forward.down.{kind}"]
    named = {f"{there}mlp.down_proj.{kind}": down}
    if activation != "swiglu":
        return named | {f"{there}mlp.up_proj.{kind}": up}
    gate, value = up.chunk(2)
    return named | {f"{there}mlp.gate_proj.{kind}": gate, f"{there}mlp.up_proj.{kind}": value}


def assert_same_logits(model: Transformer, twin: PreTrainedModel) -> None:
    tokens = text_of(2, model.config.seq_len)
    with torch.no_grad():
        ours, theirs = model(tokens), twin(tokens).logits
    assert ours.std() > 0.5  # flat logits would agree whatever the weights
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("activation", "hidden_act"), [("gelu", "gelu"), ("gelu_tanh", "gelu_new"), ("relu2", "relu2")]
)
@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2, "feed_forward_bias": True}])
def test_two_layer_feed_forward_is_arcee(
    activation: str, hidden_act: str, changes: dict[str, Any]
) -> None:
    model = small_expert(activation=activation, **changes)
    has_bias = model.config.feed_forward_bias
    assert_same_logits(model, stock_twin(model, "Arcee", hidden_act=hidden_act, mlp_bias=has_bias))


def test_the_two_gelus_are_told_apart() -> None:
    model = small_expert(activation="gelu")
    twin = stock_twin(model, "Arcee", hidden_act="gelu_new")
    with pytest.raises(AssertionError):
        assert_same_logits(model, twin)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 2},
        {"n_kv_heads": 1, "head_dim": 6, "norm_eps": 1e-3},
        {"tie_embeddings": True, "rope_theta": 500.0},
    ],
)
def test_swiglu_is_llama(changes: dict[str, Any]) -> None:
    model = small_expert(activation="swiglu", **changes)
    assert_same_logits(model, stock_twin(model, "Llama"))


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_swiglu_with_qk_norm_is_qwen3(n_kv_heads: int) -> None:
    model = small_expert(activation="swiglu", qk_norm=True, n_kv_heads=n_kv_heads)
    assert_same_logits(model, stock_twin(model, "Qwen3"))


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_swiglu_with_attention_bias_is_qwen2(n_kv_heads: int) -> None:
    model = small_expert(activation="swiglu", attention_bias=True, n_kv_heads=n_kv_heads)
    assert_same_logits(model, stock_twin(model, "Qwen2"))


@pytest.mark.parametrize("kind", ["linear", "yarn"])
@pytest.mark.parametrize("head_dim", [4, 32])
def test_scaled_positions_are_those_of_llama(kind: str, head_dim: int) -> None:
    scaling = RopeScaling(kind=kind, factor=4.0, original_seq_len=12)
    model = small_expert(std=0.2, activation="swiglu", head_dim=head_dim, rope_scaling=scaling)
    theirs = {"rope_type": kind, "factor": 4.0, "rope_theta": model.config.rope_theta}
    if kind == "yarn":
        theirs["original_max_position_embeddings"] = 12
    assert_same_logits(model, stock_twin(model, "Llama", rope_parameters=theirs))
    unscaled = stock_twin(model, "Llama")
    with pytest.raises(AssertionError):
        assert_same_logits(model, unscaled)
