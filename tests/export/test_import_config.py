"""Keys of a config.json that would make another model than the one here are refused by name."""

from typing import Any

import pytest

from export.small_stock import LLAMA_CONFIG
from pyper.errors import ConfigError
from pyper.export.import_config import read_config

TWICE = {"rope_type": "yarn", "factor": 2.0}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_act": 7}, "hidden_act"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type"),
        ({"rope_scaling": {"type": ["yarn"], "factor": 2.0}}, "rope_type"),
        ({"rope_scaling": TWICE | {"finetuned": True}}, "rope_scaling.finetuned"),
        ({"rope_scaling": TWICE | {"factor": 0.5}}, "factor"),
        ({"rope_scaling": TWICE | {"factor": "x"}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"auto_map": {"AutoModel": "x.py"}}, "auto_map"),
        ({"sliding_window": 128, "layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
        ({"residual_multiplier": 0.2}, "residual_multiplier"),
        ({"num_attention_heads": 3}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "n_kv_heads"),
        ({"head_dim": 5}, "head_dim"),
        ({"vocab_size": True}, "vocab_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"intermediate_size": 2.5}, "intermediate_size"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"attention_bias": 1.5}, "attention_bias"),
        (
            {"model_type": "mistral", "architectures": None, "attention_bias": True},
            "attention_bias",
        ),
        (
            {"model_type": "smollm3", "architectures": None, "num_hidden_layers": 10**9},
            "num_hidden_layers",
        ),
        (
            {"model_type": "smollm3", "architectures": None, "no_rope_layer_interval": 0},
            "no_rope_layer_interval",
        ),
        (
            {"model_type": "smollm3", "architectures": None, "no_rope_layers": [1]},
            "no_rope_layers",
        ),
    ],
)
def test_a_key_that_would_change_the_model_is_refused_by_name(
    changes: dict[str, Any], named: str
) -> None:
    read_config(LLAMA_CONFIG)
    with pytest.raises(ConfigError, match=named) as caught:
        read_config(LLAMA_CONFIG | changes)
    assert "\n" not in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    "key", [k for k in LLAMA_CONFIG if k not in ("model_type", "architectures")]
)
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"`{key}`"):
        read_config({k: v for k, v in LLAMA_CONFIG.items() if k != key})


def test_a_key_can_be_passed_over_when_the_user_says_so() -> None:
    plain = read_config(LLAMA_CONFIG).expert
    changed = LLAMA_CONFIG | {
        "residual_multiplier": 0.2,
        "rope_scaling": TWICE | {"finetuned": True},
    }
    names = ("residual_multiplier", "rope_scaling.finetuned")
    assert read_config(changed, names).expert.model_copy(update={"rope_scaling": None}) == plain
    with pytest.raises(ConfigError, match="no such key"):
        read_config(LLAMA_CONFIG, ("residual_multipler",))
    with pytest.raises(ConfigError, match="cannot be built without"):
        read_config(LLAMA_CONFIG, ("vocab_size",))


def test_harmless_keys_are_harmless() -> None:
    more = {"use_cache": False, "_name_or_path": "x", "attention_dropout": 0.1, "temperature": 2.0}
    assert read_config(LLAMA_CONFIG | more) == read_config(LLAMA_CONFIG)
