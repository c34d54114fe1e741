"""One dense expert as a checkpoint that plain `transformers` opens, without code of ours."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyper.checkpoint import storage_errors
from pyper.config import ExpertConfig
from pyper.errors import ConfigError
from pyper.export.families import Family, family_of
from pyper.export.hf_rope import foreign_rope
from pyper.export.hf_weights import weight_map
from pyper.export.shards import write_shards
from pyper.mixture.expert_folder import model_tensors
from pyper.nn import Transformer


def export_expert(model: Transformer, folder: Path, *, shard_bytes: int) -> str:
    """Write config.json, generation_config.json and the weights; the name of the architecture.

    shard_bytes: the most that one file of weights holds (a larger tensor has one to itself).
    Raises ConfigError naming the key of an expert that has no stock twin, StorageError.
    """
    family = family_of(model.config)
    if shard_bytes < 1:
        raise ConfigError(
            f"a shard must hold at least one byte, not {shard_bytes}", hint="5 GB is usual"
        )
    config = foreign_config(model.config, family, model.dtype)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "config.json", config)
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
        _write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
        write_shards(folder, foreign_tensors(model), shard_bytes=shard_bytes)
    return family.architecture


def foreign_config(config: ExpertConfig, family: Family, dtype: torch.dtype) -> dict[str, Any]:
    """config.json. A document's first token also ends the one before it: bos and eos are one."""
    if not config.seq_len:
        raise ConfigError(
            "`model.seq_len` is not known: a stock model states its context",
            hint="set `model.seq_len`",
        )
    bos = config.bos_id if config.bos_id >= 0 else None
    written_as = next(n for n, own in family.activations.items() if own == config.activation)
    dtype_name = str(dtype).removeprefix("torch.")
    values: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.ff_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.dim_per_head,
        "hidden_act": written_as,
        "max_position_embeddings": config.seq_len,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        **foreign_rope(config),
        "bos_token_id": bos,
        "eos_token_id": bos,
        "pad_token_id": None,
        "use_cache": True,
        "initializer_range": config.init_std,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,  # what versions before 5 read
    }
    return values | _family_keys(config, family)


def _family_keys(config: ExpertConfig, family: Family) -> dict[str, Any]:
    """Keys that only some architectures read."""
    values: dict[str, Any] = {}
    if family.attention_bias == "key":
        values["attention_bias"] = config.attention_bias
    if family.mlp_bias:
        values["mlp_bias"] = config.feed_forward_bias
    if family.default("sliding_window") is not None:
        values |= {"sliding_window": None, "use_sliding_window": False}
    if family.no_rope_layers:
        without = set(config.no_rope_layers)
        values["no_rope_layers"] = [int(i not in without) for i in range(config.n_layers)]
    return values


def foreign_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """The weights by the names of `transformers`: views of ours."""
    own = model_tensors(model)
    for stack in weight_map(model.config):
        yield from zip(stack.foreign, own[stack.own].split(stack.rows), strict=True)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
