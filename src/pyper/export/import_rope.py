"""RoPE and its scaling in a config.json, as `transformers` understands them."""

from collections.abc import Collection, Mapping
from typing import Any

from pyper.config import RopeScaling
from pyper.errors import ConfigError
from pyper.export.hf_rope import own_scaling, scaling_keys
from pyper.export.import_values import ConfigReader, refused

# Beyond that length `transformers` turns all keys by the length of the moment: a full pass and a
# cached one then differ, and a prediction depends on how much comes after it.
_DYNAMIC = (
    "`rope_type` `dynamic` changes nothing up to `max_position_embeddings`, and the context ends "
    "there: beyond it predictions would depend on later tokens"
)


_SCALED = ("linear", "yarn", "llama3")
_KNOWN_KEYS: Mapping[str, set[str]] = {
    "default": set(),
    "dynamic": {"factor", "original_max_position_embeddings"},
    **{kind: scaling_keys(kind) | {"factor"} for kind in _SCALED},
}
_COMMON_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def read_rope(
    reader: ConfigReader, ignored: Collection[str]
) -> tuple[float, RopeScaling | None, list[str]]:
    """`rope_theta`, the scaling, and what a user should know of it.

    In `rope_scaling` of old or `rope_parameters` of new, whose own keys come before those beside
    them. Raises ConfigError naming the key that would be computed otherwise.
    """
    values = reader.values
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise refused("rope_scaling", given, "it must be an object")
    given = {key: v for key, v in given.items() if f"rope_scaling.{key}" not in ignored}
    inside = {"rope_theta": given["rope_theta"]} if given.get("rope_theta") is not None else values
    theta = ConfigReader(inside, reader.family).number("rope_theta")
    partial = given.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise refused("partial_rotary_factor", partial, "Pyper turns whole heads")
    kind = _kind(given)
    if kind in _SCALED:
        return theta, _scaling(reader, kind, given), []
    return theta, None, [_DYNAMIC] if kind == "dynamic" else []


def _kind(given: Mapping[str, Any]) -> str:
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in _KNOWN_KEYS:
        raise refused("rope_type", kind, f"known: {', '.join(_KNOWN_KEYS)}")
    for key in sorted(given.keys() - _KNOWN_KEYS[kind] - _COMMON_KEYS):
        raise ConfigError(
            f"`rope_scaling.{key}` in config.json is not known with `rope_type` `{kind}`",
            hint=f"if it changes nothing: `--ignore-key rope_scaling.{key}`",
        )
    return kind


def _scaling(reader: ConfigReader, kind: str, given: Mapping[str, Any]) -> RopeScaling:
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
