"""Which stock architecture a dense expert is. One table, read in both directions.

Stated is what the classes of `transformers` compute, not what their configurations can say:
`attention_bias` of Qwen 2, for one, is ignored there, and its q, k and v always have biases.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pyper.config import ExpertConfig
from pyper.errors import ConfigError

GATED_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu"}
PLAIN_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu2": "relu2",
}
"""Foreign name → ours; the first of several is the one that is written."""


@dataclass(frozen=True)
class Family:
    """What the blocks of one architecture are."""

    model_type: str
    architecture: str
    attention_bias: Literal["none", "qkv", "key"] = "key"
    """Biases of attention; `key`: on q, k, v and o where `attention_bias` says so."""
    mlp_bias: bool = False
    """Whether it has that key; without it there are no biases."""
    gated: bool = True
    qk_norm: Literal["head", "projection"] | None = None
    norm_position: Literal["pre", "post"] = "pre"
    no_rope_layers: bool = False
    whole_heads: bool = False
    """Refuses a `hidden_size` that is no multiple of the heads, whatever `head_dim` says."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What it takes for keys that config.json lacks, where that differs from `DEFAULTS`."""

    @property
    def activations(self) -> Mapping[str, str]:
        """Foreign name → ours."""
        return GATED_ACTIVATIONS if self.gated else PLAIN_ACTIVATIONS

    def default(self, key: str) -> Any:
        """What it takes where config.json lacks the key."""
        return self.defaults.get(key, DEFAULTS[key])


DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            mlp_bias=True,
            whole_heads=True,
            defaults={"bos_token_id": 1, "eos_token_id": 2},
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            attention_bias="none",
            defaults={
                "num_key_value_heads": 8,
                "max_position_embeddings": 131_072,
                "sliding_window": 4096,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            attention_bias="qkv",
            defaults={
                "num_key_value_heads": 32,
                "max_position_embeddings": 32_768,
                "sliding_window": 4096,
            },
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            qk_norm="head",
            defaults={
                "num_key_value_heads": 32,
                "head_dim": 128,
                "max_position_embeddings": 32_768,
                "sliding_window": 4096,
            },
        ),
        Family(
            "smollm3",
            "SmolLM3ForCausalLM",
            mlp_bias=True,
            no_rope_layers=True,
            defaults={
                "num_key_value_heads": 4,
                "max_position_embeddings": 32_768,
                "rope_theta": 2_000_000.0,
                "tie_word_embeddings": True,
                "bos_token_id": 128_000,
                "eos_token_id": 128_001,
            },
        ),
        Family(
            "olmo2",
            "Olmo2ForCausalLM",
            qk_norm="projection",
            norm_position="post",
            defaults={"rms_norm_eps": 1e-5, "eos_token_id": 50_279},
        ),
        Family(
            "arcee",
            "ArceeForCausalLM",
            mlp_bias=True,
            gated=False,
            whole_heads=True,
            defaults={
                "hidden_act": "relu2",
                "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5,
                "bos_token_id": 128_000,
                "eos_token_id": 128_001,
            },
        ),
    )
}


def family_of(config: ExpertConfig) -> Family:
    """The stock architecture that computes what this expert does.

    Raises ConfigError naming the key that no such architecture has.
    """
    if config.kind != "dense":
        raise ConfigError(
            f'`model.kind = "{config.kind}"` has no stock twin: only dense experts have one',
            hint="export a dense expert, or the whole mixture",
        )
    family = FAMILIES[_nearest(config)]
    if (key := _key_without_twin(family, config)) is not None:
        raise ConfigError(
            f"`model.{key} = {getattr(config, key)!r}` has no twin in {family.architecture}, the "
            "stock architecture nearest to this expert",
            hint="such a combination runs in Pyper alone; docs/import-export.md lists the others",
        )
    return family


def _nearest(config: ExpertConfig) -> str:
    if config.activation != "swiglu":
        return "arcee"
    if config.norm_position == "post" or config.qk_norm_over == "projection":
        return "olmo2"
    if config.qk_norm:
        return "qwen3"
    if config.no_rope_layers:
        return "smollm3"
    return "qwen2" if config.attention_bias and not config.attention_output_bias else "llama"


def _key_without_twin(family: Family, config: ExpertConfig) -> str | None:
    qk_norm = config.qk_norm_over if config.qk_norm else None
    has_biases = (config.attention_bias, config.attention_output_bias)
    possible = {"none": {(False, False)}, "qkv": {(True, False)}}.get(
        family.attention_bias, {(False, False), (True, True)}
    )
    fits = {
        "norm_position": config.norm_position == family.norm_position,
        "qk_norm": (qk_norm is None) == (family.qk_norm is None),
        "qk_norm_over": qk_norm == family.qk_norm,
        "no_rope_layers": not config.no_rope_layers or family.no_rope_layers,
        "attention_output_bias": has_biases in possible,
        "feed_forward_bias": not config.feed_forward_bias or family.mlp_bias,
        "n_heads": not family.whole_heads or config.d_model % config.n_heads == 0,
    }
    return next((key for key, does_fit in fits.items() if not does_fit), None)
