"""Shapes of published models, as their config.json says them, and how large those models are."""

from typing import Any

import pytest

from pyper.export import family_of
from pyper.export.import_config import read_config
from pyper.nn import count_parameters

COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0",
    "use_cache": True,
}


def shape(
    kind: str, architecture: str, d: int, ff: int, layers: int, heads: int, kv: int, vocab: int
) -> dict[str, Any]:
    return COMMON | {
        "model_type": kind,
        "architectures": [architecture],
        "hidden_size": d,
        "intermediate_size": ff,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
    }


LLAMA3 = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
QWEN = {"use_sliding_window": False, "rope_theta": 1_000_000, "tie_word_embeddings": True}
PUBLISHED: dict[str, tuple[dict[str, Any], int, int]] = {
    "SmolLM2-135M": (
        shape("llama", "LlamaForCausalLM", 576, 1536, 30, 9, 3, 49_152)
        | {"is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 1}
        | {"rope_scaling": None, "rope_theta": 100_000, "tie_word_embeddings": True}
        | {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "attention_bias": False},
        8192,
        134_515_008,
    ),
    "Llama-3.2-1B": (
        shape("llama", "LlamaForCausalLM", 2048, 8192, 16, 32, 8, 128_256)
        | {"head_dim": 64, "mlp_bias": False, "rope_scaling": LLAMA3, "rope_theta": 500_000.0}
        | {"max_position_embeddings": 131_072, "tie_word_embeddings": True},
        131_072,
        1_235_814_400,
    ),
    "Mistral-7B-v0.1": (
        shape("mistral", "MistralForCausalLM", 4096, 14_336, 32, 32, 8, 32_000)
        | {"max_position_embeddings": 32_768, "sliding_window": 4096, "rope_theta": 10_000.0}
        | {"tie_word_embeddings": False},
        4096,
        7_241_732_096,
    ),
    "Qwen2.5-0.5B": (
        shape("qwen2", "Qwen2ForCausalLM", 896, 4864, 24, 14, 2, 151_936)
        | QWEN
        | {"max_window_layers": 24, "sliding_window": 32_768, "use_mrope": False}
        | {"max_position_embeddings": 32_768},
        32_768,
        494_032_768,
    ),
    "Qwen3-0.6B": (
        shape("qwen3", "Qwen3ForCausalLM", 1024, 3072, 28, 16, 8, 151_936)
        | QWEN
        | {"head_dim": 128, "max_window_layers": 28, "sliding_window": None}
        | {"max_position_embeddings": 32_768, "rope_scaling": None, "attention_bias": False},
        32_768,
        596_049_920,
    ),
    "SmolLM3-3B": (
        shape("smollm3", "SmolLM3ForCausalLM", 2048, 11_008, 36, 16, 4, 128_256)
        | {"layer_types": ["full_attention"] * 36, "no_rope_layers": [1, 1, 1, 0] * 9}
        | {"no_rope_layer_interval": 4, "max_window_layers": 28, "sliding_window": None}
        | {"use_sliding_window": False, "pad_token_id": 128_004, "pretraining_tp": 2}
        | {"max_position_embeddings": 65_536, "rope_theta": 5_000_000.0, "mlp_bias": False},
        65_536,
        3_075_098_624,
    ),
    "OLMo-2-0425-1B": (
        shape("olmo2", "Olmo2ForCausalLM", 2048, 8192, 16, 16, 16, 100_352)
        | {"rope_scaling": None, "rope_theta": 500_000, "attention_bias": False}
        | {"max_position_embeddings": 4096, "pad_token_id": 100_277, "eos_token_id": 100_257},
        4096,
        1_484_916_736,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_understood_and_as_large_as_its_card_says(name: str) -> None:
    values, context, parameters = PUBLISHED[name]
    foreign = read_config(values)
    assert foreign.expert.seq_len == context
    assert bool(foreign.notes) == (name == "Mistral-7B-v0.1")
    assert count_parameters(foreign.expert) == parameters
    expected = values["architectures"][0].replace("Mistral", "Llama")
    assert family_of(foreign.expert).architecture == expected
