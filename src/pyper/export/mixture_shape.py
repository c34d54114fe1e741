"""A model's shape and weights as the exported modelling files read them (modeling/pyper_layers.py).

Names of weights stay Pyper's own, but for the routers' state: thresholds are written as they stand,
not as the moving averages of training.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyper.config import ExpertConfig
from pyper.errors import ConfigError
from pyper.mixture.expert_folder import model_tensors
from pyper.nn import Transformer
from pyper.nn.rope import attention_scale, inverse_frequencies
from pyper.nn.router_state import RouterState

_AS_IT_IS = (
    "vocab_size",
    "seq_len",
    "bos_id",
    "attend_across_documents",
    "d_model",
    "n_layers",
    "n_heads",
    "activation",
    "qk_norm",
    "qk_norm_over",
    "norm_position",
    "attention_bias",
    "attention_output_bias",
    "feed_forward_bias",
    "no_rope_layers",
    "tie_embeddings",
    "norm_eps",
)
_RESOLVED = ("n_kv_heads", "head_dim", "d_ff", "rope_theta", "rope_scaling", "sparse", "kind")
_OF_TRAINING = ("init", "init_std")
_SPARSE = (
    "n_experts",
    "every",
    "routing",
    "gate",
    "shared_d_ff",
    "attention_experts",
    "max_experts_per_token",
    "top_k",
    "normalize_gates",
)


def exported_shape(config: ExpertConfig) -> dict[str, Any]:
    """What `Decoder(shape)` needs. Raises ConfigError for what it cannot be."""
    if config.kind == "token_mixture":
        raise ConfigError(
            '`kind = "token_mixture"` runs in Pyper alone: it has no modelling file',
            hint='`kind = "sparse"` and mixtures of dense experts can be exported',
        )
    _refuse_unknown(config)
    values = config.model_dump(mode="json")
    frequencies = inverse_frequencies(
        config.dim_per_head, config.rope_theta, config.rope_scaling, torch.device("cpu")
    )
    sparse = {key: getattr(config.routing, key) for key in _SPARSE}
    return {
        **{key: values[key] for key in _AS_IT_IS},
        "n_kv_heads": config.kv_heads,
        "head_dim": config.dim_per_head,
        "d_ff": config.ff_dim,
        # With the scaling, whatever its kind, in them.
        "rope_frequencies": frequencies.tolist(),
        "rope_scale": attention_scale(config.rope_scaling),
        "sparse": None if config.kind == "dense" else sparse,
    }


def exported_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Names and weights for `Decoder(exported_shape(model.config))`."""
    for name, tensor in model_tensors(model).items():
        if not name.endswith((".threshold_total", ".threshold_updates")):
            yield name, tensor
    for name, module in model.named_modules():
        if isinstance(module, RouterState):
            yield f"{name}.threshold", module.threshold


def _refuse_unknown(config: ExpertConfig) -> None:
    """A key that came later must be taught to the modelling file, or have no effect."""
    for key, field in ExpertConfig.model_fields.items():
        value, known = getattr(config, key), (*_AS_IT_IS, *_RESOLVED, *_OF_TRAINING)
        if key not in known and value != field.get_default():
            raise ConfigError(
                f"`model.{key} = {value!r}` is not known to the exported modelling file",
                hint="export one expert with `--expert`: it may have a stock architecture",
            )
