"""RoPE and its scaling, in our words and in those of config.json."""

from collections.abc import Mapping
from typing import Any

from pyper.config import ExpertConfig, RopeScaling
from pyper.config.expert import SCALING_KEYS
from pyper.config.load import validate

_LENGTH = "original_max_position_embeddings"


def foreign_rope(config: ExpertConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` for config.json, in the form that all versions read."""
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_theta": config.rope_theta, "rope_scaling": None}
    if scaling.kind == "ntk":  # nothing but a larger base
        K = config.dim_per_head
        base = config.rope_theta * scaling.factor ** (K / (K - 2))
        return {"rope_theta": base, "rope_scaling": None}
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    for own in SCALING_KEYS[scaling.kind]:
        if (value := getattr(scaling, own)) is not None:
            values[_foreign_name(own)] = value
    return {"rope_theta": config.rope_theta, "rope_scaling": values}


def scaling_keys(kind: str) -> set[str]:
    """What `rope_scaling` of that type may hold beside type and factor."""
    return {_foreign_name(own) for own in SCALING_KEYS[kind]}


def own_scaling(kind: str, values: Mapping[str, Any]) -> RopeScaling:
    """The scaling of a `rope_scaling` whose keys were checked; null is as good as absent."""
    given = {
        own: value
        for own in SCALING_KEYS[kind]
        if (value := values.get(_foreign_name(own))) is not None
    }
    return validate(RopeScaling, {"kind": kind, "factor": values.get("factor"), **given})


def _foreign_name(own: str) -> str:
    return _LENGTH if own == "original_seq_len" else own
