"""config.json of `transformers` → `ExpertConfig`, exactly or not at all.

A key is read, or checked against the values under which it changes nothing, or known to be
harmless; any other is refused by name, since it may change what the model computes.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pyper.config import ExpertConfig, RopeScaling
from pyper.config.load import nearest, validate
from pyper.errors import ConfigError
from pyper.export.families import FAMILIES, Family
from pyper.export.hf_rope import own_scaling, scaling_keys

_ABSENT: Any = object()
_MOST_LAYERS = 4096
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
    reader = _Reader(values, family)
    seq_len, notes = _context(reader)
    theta, scaling, rope_notes = _rope(reader, ignored)
    activation = reader.get("hidden_act")
    if activation not in family.activations:
        raise _refused("hidden_act", activation, f"known: {', '.join(family.activations)}")
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
        raise _refused("model_type", kind, f"known: {', '.join(FAMILIES)}")
    if architectures not in (None, [family.architecture]):
        raise _refused("architectures", architectures, f"it must be `{family.architecture}`")
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
                f"config.json has the key `{key}` ({_short(value)}), which Pyper does not know",
                hint=f"if it changes nothing that the model computes: `--ignore-key {key}`",
            )
        if value not in _CHANGES_NOTHING_AS[key]:
            raise _refused(key, value, "Pyper has nothing that computes this")


class _Reader:
    """Values of the right type, or the family's defaults."""

    def __init__(self, values: Mapping[str, Any], family: Family) -> None:
        self.values, self.family = values, family

    def get(self, key: str) -> Any:
        """As it stands; the family's default where it does not."""
        value = self.values.get(key, _ABSENT)
        return self.family.default(key) if value is _ABSENT else value

    def count(self, key: str) -> int:
        """A whole number from 1, which must be there."""
        value = self.values.get(key, _ABSENT)
        if value is _ABSENT and key == "max_position_embeddings":
            value = self.family.default(key)
        if value is _ABSENT:
            raise ConfigError(f"config.json lacks `{key}`", hint="download the model again")
        # Lists are made as long as there are layers, before the weights say how many there are.
        most = _MOST_LAYERS if key == "num_hidden_layers" else 2**31 - 1
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise _refused(key, value, f"it must be a whole number in 1 … {most:,}")
        return value

    def optional_count(self, key: str) -> int | None:
        """The same, where null and absence have a meaning."""
        value = self.get(key)
        return None if value is None else _Reader({key: value}, self.family).count(key)

    def number(self, key: str) -> float:
        """A positive number."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise _refused(key, value, "it must be a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false; null is false."""
        value = self.get(key)
        if not isinstance(value, bool | None):
            raise _refused(key, value, "it must be true or false")
        return bool(value)


def _heads(reader: _Reader) -> dict[str, Any]:
    d_model, n_heads = reader.count("hidden_size"), reader.count("num_attention_heads")
    if reader.family.whole_heads and d_model % n_heads:
        raise _refused("num_attention_heads", n_heads, f"it must divide `hidden_size` ({d_model})")
    return {
        "d_model": d_model,
        "n_layers": reader.count("num_hidden_layers"),
        "n_heads": n_heads,
        "n_kv_heads": reader.optional_count("num_key_value_heads") or n_heads,
        "head_dim": reader.optional_count("head_dim") or max(1, d_model // n_heads),
    }


def _blocks(reader: _Reader) -> dict[str, Any]:
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


def _no_rope_layers(reader: _Reader) -> tuple[int, ...]:
    n_layers, listed = reader.count("num_hidden_layers"), reader.values.get("no_rope_layers")
    if listed is None:
        every = 4
        if "no_rope_layer_interval" in reader.values:
            every = reader.count("no_rope_layer_interval")
        return tuple(range(every - 1, n_layers, every))
    is_list = isinstance(listed, list) and all(flag in (0, 1) for flag in listed)
    if not is_list or len(listed) < n_layers:
        raise _refused("no_rope_layers", listed, f"it must hold {n_layers} times 0 or 1")
    return tuple(layer for layer, flag in enumerate(listed[:n_layers]) if not flag)


def _context(reader: _Reader) -> tuple[int, list[str]]:
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


def _window(reader: _Reader) -> int | None:
    """The sliding window of the layers that have one."""
    family, types = reader.family, reader.values.get("layer_types")
    if types is not None:
        known = {"full_attention", "sliding_attention"}
        if not isinstance(types, list) or not all(isinstance(t, str) for t in types):
            raise _refused("layer_types", types, "it must be a list of names")
        if other := [t for t in types if t not in known]:
            raise _refused("layer_types", other[0], "Pyper has full attention alone")
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
        raise _refused("layer_types", "sliding_attention", "without a `sliding_window` in use")
    return None


def _rope(reader: _Reader, ignored: Collection[str]) -> tuple[float, RopeScaling | None, list[str]]:
    values = reader.values
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise _refused("rope_scaling", given, "it must be an object")
    given = {key: v for key, v in given.items() if f"rope_scaling.{key}" not in ignored}
    theta = _Reader(
        {"rope_theta": given["rope_theta"]} if given.get("rope_theta") is not None else values,
        reader.family,
    ).number("rope_theta")
    partial = given.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise _refused("partial_rotary_factor", partial, "Pyper turns whole heads")
    kind = given.get("rope_type", given.get("type", "default"))
    known = {"default": set(), "dynamic": {"factor", "original_max_position_embeddings"}}
    known |= {kind: scaling_keys(kind) | {"factor"} for kind in ("linear", "yarn", "llama3")}
    if not isinstance(kind, str) or kind not in known:
        raise _refused("rope_type", kind, f"known: {', '.join(known)}")
    common = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    for key in given.keys() - known[kind] - common:
        raise ConfigError(
            f"`rope_scaling.{key}` in config.json is not known with `rope_type` `{kind}`",
            hint=f"if it changes nothing: `--ignore-key rope_scaling.{key}`",
        )
    if kind == "default":
        return theta, None, []
    if kind == "dynamic":
        return theta, None, [_DYNAMIC]
    return theta, _scaling(reader, kind, given), []


# Beyond that length `transformers` turns all keys by the length of the moment: a full pass and a
# cached one then differ, and a prediction depends on how much comes after it.
_DYNAMIC = (
    "`rope_type` `dynamic` changes nothing up to `max_position_embeddings`, and the context ends "
    "there: beyond it predictions would depend on later tokens"
)


def _scaling(reader: _Reader, kind: str, given: Mapping[str, Any]) -> RopeScaling:
    longest = reader.count("max_position_embeddings")
    values = dict(given)
    if kind in ("yarn", "llama3"):
        stated = reader.values.get("original_max_position_embeddings")
        original = stated or values.get("original_max_position_embeddings") or longest
        values["original_max_position_embeddings"] = original
        if kind == "yarn" and values.get("factor") is None and isinstance(original, int):
            values["factor"] = longest / original
    if not (values.get("mscale") and values.get("mscale_all_dim")):  # only both have an effect
        values.pop("mscale", None)
        values.pop("mscale_all_dim", None)
    for key in ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ():
        if key not in values:
            raise ConfigError(
                f"`rope_scaling` in config.json lacks `{key}`", hint="download the model again"
            )
    try:
        return own_scaling(kind, values)
    except ConfigError as error:
        raise ConfigError(
            f"`rope_scaling` in config.json: {error.message}", hint="download the model again"
        ) from None


def _refused(key: str, value: Any, why: str) -> ConfigError:
    return ConfigError(
        f"`{key}` in config.json is {_short(value)}: {why}",
        hint="this model cannot be taken over exactly; docs/import-export.md lists what can",
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
