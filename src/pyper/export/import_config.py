"""config.json of `transformers` → `ExpertConfig`, exactly or not at all.

A key is read, or checked against the values under which it changes nothing, or known to be
harmless; any other is refused by name, since it may change what the model computes.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pyper.config import ExpertConfig
from pyper.config.explain import nearest
from pyper.config.load import validate
from pyper.errors import ConfigError
from pyper.export.families import FAMILIES, Family
from pyper.export.import_rope import read_rope
from pyper.export.import_values import ConfigReader, refused, short

_READ_KEYS = """
model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers
num_attention_heads num_key_value_heads head_dim hidden_act max_position_embeddings rms_norm_eps
tie_word_embeddings rope_theta rope_scaling rope_parameters original_max_position_embeddings
partial_rotary_factor sliding_window use_sliding_window max_window_layers layer_types bos_token_id
eos_token_id dtype torch_dtype
"""
# How it was made, how `transformers` handles it, and defaults of generation from before they had a
# file of their own.
_HARMLESS_KEYS = """
transformers_version _name_or_path name_or_path use_cache initializer_range pretraining_tp
attention_dropout hidden_dropout resid_dropout embd_dropout gradient_checkpointing
_attn_implementation _attn_implementation_autoset attn_implementation _commit_hash tokenizer_class
pad_token_id unk_token_id sep_token_id decoder_start_token_id torchscript return_dict
return_dict_in_generate output_hidden_states output_attentions output_scores is_decoder
chunk_size_feed_forward problem_type id2label label2id num_labels task_specific_params
finetuning_task use_bfloat16 tf_legacy_loss transformers.js_config unsloth_version unsloth_fixed
is_llama_config base_model_tp_plan base_model_pp_plan keys_to_ignore_at_inference prefix max_length
min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k
top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values
exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
"""
_READ, _HARMLESS = frozenset(_READ_KEYS.split()), frozenset(_HARMLESS_KEYS.split())
_CHANGES_NOTHING_AS: Mapping[str, tuple[Any, ...]] = {
    "rope_interleaved": (None, False),
    "use_mrope": (None, False),
    "quantization_config": (None,),
    "compression_config": (None,),
    "attn_logit_softcapping": (None,),
    "attention_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "clip_qkv": (None,),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (None, False),
    "pruned_heads": (None, {}),
    "auto_map": (None,),
    "use_qk_norm": (None, False),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
}


@dataclass(frozen=True)
class ForeignConfig:
    """A config.json, understood."""

    family: Family
    expert: ExpertConfig
    """Its `bos_id` is not known yet: that takes the tokenizer."""
    notes: tuple[str, ...]
    """What a user should know of the difference between there and here."""


def read_config(values: Mapping[str, Any], ignored: Collection[str] = ()) -> ForeignConfig:
    """Understand the values of a config.json.

    ignored: keys that are refused, and shall be passed over. Raises ConfigError naming the key.
    """
    family = _family(values)
    values = _without(values, ignored, family)
    _check_keys(values, family, ignored)
    reader = ConfigReader(values, family)
    seq_len, notes = _context(reader)
    theta, scaling, rope_notes = read_rope(reader, ignored)
    activation = reader.get("hidden_act")
    if not isinstance(activation, str) or activation not in family.activations:
        raise refused("hidden_act", activation, f"known: {', '.join(family.activations)}")
    expert = {
        "vocab_size": reader.count("vocab_size"),
        "seq_len": seq_len,
        "d_ff": reader.count("intermediate_size"),
        **_heads(reader),
        "activation": family.activations[activation],
        **_blocks(reader),
        "tie_embeddings": reader.flag("tie_word_embeddings"),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": reader.number("rms_norm_eps"),
    }
    return ForeignConfig(family, validate(ExpertConfig, expert), (*notes, *rope_notes))


def _family(values: Mapping[str, Any]) -> Family:
    kind, architectures = values.get("model_type"), values.get("architectures")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise refused("model_type", kind, f"known: {', '.join(FAMILIES)}")
    if architectures not in (None, [family.architecture]):
        raise refused("architectures", architectures, f"it must be `{family.architecture}`")
    return family


def _without(values: Mapping[str, Any], ignored: Collection[str], family: Family) -> dict[str, Any]:
    for key in ignored:
        if key in _READ or key in _family_keys(family):
            raise ConfigError(
                f"`--ignore-key {key}`: the model cannot be built without it",
                hint="change config.json if it is wrong there",
            )
        if "." not in key and key not in values:
            raise ConfigError(
                f"`--ignore-key {key}`: config.json has no such key", hint=nearest(key, [*values])
            )
    return {key: value for key, value in values.items() if key not in ignored}


def _family_keys(family: Family) -> set[str]:
    """Keys that only some architectures read."""
    keys = {"attention_bias"} if family.attention_bias != "none" else set()
    if family.mlp_bias:
        keys.add("mlp_bias")
    return keys | ({"no_rope_layers", "no_rope_layer_interval"} if family.no_rope_layers else set())


def _check_keys(values: Mapping[str, Any], family: Family, ignored: Collection[str]) -> None:
    own = _family_keys(family)
    for key, value in values.items():
        if key in _READ or key in _HARMLESS or key in own:
            continue
        if key not in _CHANGES_NOTHING_AS:
            raise ConfigError(
                f"config.json has the key `{key}` ({short(value)}), which Pyper does not know",
                hint=f"if it changes nothing that the model computes: `--ignore-key {key}`",
            )
        if value not in _CHANGES_NOTHING_AS[key]:
            raise refused(key, value, "Pyper has nothing that computes this")


def _heads(reader: ConfigReader) -> dict[str, Any]:
    d_model, n_heads = reader.count("hidden_size"), reader.count("num_attention_heads")
    if reader.family.whole_heads and d_model % n_heads:
        raise refused("num_attention_heads", n_heads, f"it must divide `hidden_size` ({d_model})")
    return {
        "d_model": d_model,
        "n_layers": reader.count("num_hidden_layers"),
        "n_heads": n_heads,
        "n_kv_heads": reader.optional_count("num_key_value_heads") or n_heads,
        "head_dim": reader.optional_count("head_dim") or max(1, d_model // n_heads),
    }


def _blocks(reader: ConfigReader) -> dict[str, Any]:
    family = reader.family
    has_bias = family.attention_bias == "key" and reader.flag("attention_bias")
    return {
        "norm_position": family.norm_position,
        "qk_norm": family.qk_norm is not None,
        "qk_norm_over": family.qk_norm or "head",
        "attention_bias": has_bias or family.attention_bias == "qkv",
        "attention_output_bias": has_bias,
        "feed_forward_bias": family.mlp_bias and reader.flag("mlp_bias"),
        "no_rope_layers": _no_rope_layers(reader) if family.no_rope_layers else (),
    }


def _no_rope_layers(reader: ConfigReader) -> tuple[int, ...]:
    n_layers, listed = reader.count("num_hidden_layers"), reader.values.get("no_rope_layers")
    if listed is None:
        every = 4
        if "no_rope_layer_interval" in reader.values:
            every = reader.count("no_rope_layer_interval")
        return tuple(range(every - 1, n_layers, every))
    is_list = isinstance(listed, list) and all(flag in (0, 1) for flag in listed)
    if not is_list or len(listed) < n_layers:
        raise refused("no_rope_layers", listed, f"it must hold {n_layers} times 0 or 1")
    return tuple(layer for layer, flag in enumerate(listed[:n_layers]) if not flag)


def _context(reader: ConfigReader) -> tuple[int, list[str]]:
    """The length up to which every layer sees everything."""
    longest = reader.count("max_position_embeddings")
    window = _window(reader)
    if window is None or window >= longest:
        return longest, []
    note = (
        f"the context is {window:,} instead of {longest:,} tokens: layers with `sliding_window` "
        "see no further, and up to there the models are the same"
    )
    return window, [note]


def _window(reader: ConfigReader) -> int | None:
    """The sliding window of the layers that have one."""
    family, types = reader.family, reader.values.get("layer_types")
    if types is not None:
        known = {"full_attention", "sliding_attention"}
        if not isinstance(types, list) or not all(isinstance(t, str) for t in types):
            raise refused("layer_types", types, "it must be a list of names")
        if other := [t for t in types if t not in known]:
            raise refused("layer_types", other[0], "Pyper has full attention alone")
    slides = types is not None and "sliding_attention" in types
    if family.model_type == "mistral":
        return reader.optional_count("sliding_window")
    if reader.flag("use_sliding_window") and reader.get("sliding_window") is not None:
        by_layer = types is None and (
            family.no_rope_layers
            or reader.count("num_hidden_layers") > (reader.get("max_window_layers") or 0)
        )
        return reader.optional_count("sliding_window") if slides or by_layer else None
    if slides:
        raise refused("layer_types", "sliding_attention", "without a `sliding_window` in use")
    return None
