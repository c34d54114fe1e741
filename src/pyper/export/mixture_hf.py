"""Mixtures, and models without a stock twin, for `transformers`: with modelling files."""

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from pyper.errors import ConfigError
from pyper.export.mixture_shape import exported_shape, exported_tensors
from pyper.export.shards import write_shards
from pyper.mixture import LMRouter, Mixture, MixtureSettings, UnigramRouter
from pyper.mixture.mixing import inference_prices
from pyper.nn import Transformer


def export_mixture(mixture: Mixture, folder: Path, *, shard_bytes: int) -> str:
    """Write config.json, modelling files and weights of all experts; the architecture's name.

    Raises ConfigError for what the modelling file cannot do, StorageError.
    """
    settings = mixture.settings
    if settings.mixing == "window":
        raise ConfigError(
            'mixtures with `mixing = "window"` cannot be exported',
            hint="export another rule: `--mixing posterior` or `--mixing top1`",
        )
    experts = [exported_shape(mixture.expert(e).config) for e in range(mixture.n_experts)]
    routers = mixture.router.models if isinstance(mixture.router, LMRouter) else []
    config = _mixing(settings) | {
        "experts": experts,
        "router_models": [exported_shape(model.config) for model in routers],
        "max_position_embeddings": settings.seq_len,
    }
    write_shards(folder, _tensors(mixture, routers), shard_bytes=shard_bytes)
    dtype = str(mixture.expert(0).dtype).removeprefix("torch.")
    return _write(folder, "Mixture", config, settings.bos_id, dtype)


def export_single(model: Transformer, folder: Path, *, shard_bytes: int) -> str:
    """Write one dense or sparse model with a modelling file of its own; the architecture's name.

    Raises ConfigError for what the modelling file cannot do, StorageError.
    """
    shape = exported_shape(model.config)
    named = ((f"decoder.{name}", tensor) for name, tensor in exported_tensors(model))
    write_shards(folder, named, shard_bytes=shard_bytes)
    dtype = str(model.dtype).removeprefix("torch.")
    return _write(folder, "", {"shape": shape}, model.config.bos_id, dtype)


def _mixing(settings: MixtureSettings) -> dict[str, Any]:
    prices = inference_prices(settings)
    return {
        "expert_names": list(settings.experts),
        "mixing": settings.mixing,
        "mixing_temperature": settings.temperature,
        "mixing_top_k": min(settings.top_k, settings.n_experts),
        "mixing_prune": settings.prune,
        "prefix_tokens": settings.prefix_tokens,
        "prices": None if prices is None else prices.tolist(),
        "router": settings.router,
    }


def _tensors(mixture: Mixture, routers: list[Transformer]) -> Iterator[tuple[str, Tensor]]:
    for number in range(mixture.n_experts):
        for name, tensor in exported_tensors(mixture.expert(number)):
            yield f"experts.{number}.{name}", tensor
    for number, model in enumerate(routers):
        for name, tensor in exported_tensors(model):
            yield f"router_models.{number}.{name}", tensor
    if isinstance(mixture.router, UnigramRouter):
        yield "unigram.log_probs", mixture.router.log_probs


def _write(folder: Path, kind: str, config: dict[str, Any], bos_id: int, dtype: str) -> str:
    """config.json, generation_config.json and the modelling files."""
    module, name = f"pyper_{kind.lower()}" if kind else "pyper", f"Pyper{kind}ForCausalLM"
    # Every document begins with this token, which also ends the one before it.
    ids = {"bos_token_id": bos_id, "eos_token_id": bos_id, "pad_token_id": bos_id}
    whole = {
        "architectures": [name],
        "model_type": module,
        "auto_map": {
            "AutoConfig": f"configuration_{module}.Pyper{kind}Config",
            "AutoModelForCausalLM": f"modeling_{module}.{name}",
        },
        "dtype": dtype,
        "tie_word_embeddings": False,
        **ids,
        **config,
    }
    for file, values in (("config.json", whole), ("generation_config.json", ids)):
        (folder / file).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    shared = ("pyper_generation.py", "pyper_layers.py", "pyper_feed_forward.py")
    for file in (f"configuration_{module}.py", f"modeling_{module}.py", *shared):
        source = resources.files("pyper.export") / "modeling" / file
        (folder / file).write_bytes(source.read_bytes())
    return name
