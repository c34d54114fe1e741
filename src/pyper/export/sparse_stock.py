"""Sparse models as stock architectures of `transformers`, where those compute exactly the same.

All three take the softmax over all experts, then the `top_k` highest. Mixtral: no QK-norm, gates
divided by their sum, every layer sparse. Qwen3-MoE: QK-norm by head, gates divided or not, every
n-th layer sparse. OLMoE: QK-norm over all heads, gates divided or not, every layer sparse.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from pyper.config import ExpertConfig
from pyper.errors import ConfigError
from pyper.export.families import FAMILIES
from pyper.export.hf_expert import foreign_config
from pyper.export.hf_weights import weight_map
from pyper.export.mixture_shape import exported_shape
from pyper.export.shards import write_shards
from pyper.mixture.expert_folder import model_tensors
from pyper.nn import Transformer
from pyper.nn.router_state import RouterState

_MIXTRAL, _QWEN3, _OLMOE = "MixtralForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM"
_MODEL_TYPES = {_MIXTRAL: "mixtral", _QWEN3: "qwen3_moe", _OLMOE: "olmoe"}


def why_not_stock(model: Transformer) -> str | None:
    """What no stock architecture computes; None where one is exact."""
    config, sparse = model.config, model.config.routing
    exported_shape(config)  # refuses what nobody here knows
    name = _architecture(config)
    biased = any(bool(state.balance_bias.any()) for state in _states(model))
    reasons = {
        "its experts choose tokens, stock ones are chosen": sparse.is_expert_choice,
        f"its activation is `{config.activation}`, not SwiGLU": config.activation != "swiglu",
        "its gates are sigmoids, not a softmax": sparse.gate != "softmax",
        "its routers have learnt balancing biases": biased,
        "it has a shared expert": sparse.shared_d_ff > 0,
        "it has several attentions in a layer": config.attention_experts > 0,
        "its feed-forwards have biases": config.feed_forward_bias,
        "its blocks are post-norm": config.norm_position == "post",
        "it has layers without RoPE": bool(config.no_rope_layers),
        "its attention stays inside a document": not config.attend_across_documents,
        "its gates are not divided by their sum, and it has no QK-norm": (
            name == _MIXTRAL and not sparse.normalize_gates
        ),
        "only every n-th layer is sparse, and it has no QK-norm by head": (
            name != _QWEN3 and sparse.every > 1
        ),
        "only some of its attention's projections have biases": (
            config.attention_bias != config.attention_output_bias
        ),
        "its attention has biases, and no QK-norm": name == _MIXTRAL and config.attention_bias,
        "its heads are not `d_model / n_heads` wide": (
            name == _OLMOE and config.dim_per_head * config.n_heads != config.d_model
        ),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def export_stock(model: Transformer, folder: Path, *, shard_bytes: int) -> str:
    """Write config.json and weights; the architecture's name. Raises ConfigError."""
    reason = why_not_stock(model)
    if reason is not None:
        raise ConfigError(
            f"no stock architecture is exactly this sparse model: {reason}",
            hint="`--architecture pyper` writes it with a modelling file of its own",
        )
    name = _architecture(model.config)
    config = _config(model, name)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    for file, values in (("config.json", config), ("generation_config.json", ids)):
        (folder / file).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    write_shards(folder, _tensors(model, name), shard_bytes=shard_bytes)
    return name


def _states(model: Transformer) -> Iterator[RouterState]:
    return (module for module in model.modules() if isinstance(module, RouterState))


def _architecture(config: ExpertConfig) -> str:
    if not config.qk_norm:
        return _MIXTRAL
    return _QWEN3 if config.qk_norm_over == "head" else _OLMOE


def _config(model: Transformer, name: str) -> dict[str, Any]:
    sparse, dense = model.config.routing, model.config.as_dense()
    values = foreign_config(dense, FAMILIES["qwen3"], model.dtype)
    values |= {
        "architectures": [name],
        "model_type": _MODEL_TYPES[name],
        "num_experts_per_tok": sparse.top_k,
        "num_local_experts" if name == _MIXTRAL else "num_experts": sparse.n_experts,
    }
    if name != _MIXTRAL:
        values["norm_topk_prob"] = sparse.normalize_gates
    if name == _QWEN3:
        values |= {"moe_intermediate_size": dense.ff_dim, "decoder_sparse_step": sparse.every}
    return values


def _tensors(model: Transformer, name: str) -> Iterator[tuple[str, Tensor]]:
    own, config = model_tensors(model), model.config
    for stack in weight_map(config.as_dense()):
        layer = int(stack.own.split(".")[1]) if stack.own.startswith("blocks.") else -1
        if ".feed_forward." in stack.own and config.has_sparse_feed_forward(layer):
            continue
        parts = own[stack.own].split(stack.rows)
        yield from zip(stack.foreign, parts, strict=True)
    for layer in range(config.n_layers):
        if config.has_sparse_feed_forward(layer):
            yield from _sparse_layer(own, layer, name)


def _sparse_layer(own: dict[str, Tensor], layer: int, name: str) -> Iterator[tuple[str, Tensor]]:
    here = f"blocks.{layer}.feed_forward."
    block = "block_sparse_moe" if name == _MIXTRAL else "mlp"
    keys = ("w1", "w3", "w2") if name == _MIXTRAL else ("gate_proj", "up_proj", "down_proj")
    there = f"model.layers.{layer}.{block}."
    yield f"{there}gate.weight", own[f"{here}router.weight"]
    pairs = zip(own[f"{here}up.weight"], own[f"{here}down.weight"], strict=True)
    for expert, (up, down) in enumerate(pairs):
        for key, tensor in zip(keys, (*up.chunk(2), down), strict=True):
            yield f"{there}experts.{expert}.{key}.weight", tensor
