"""Imported models are those of `transformers`: equal logits, equal texts, equal weights again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from export.small_stock import (
    CASES,
    CONTEXT,
    VARIANTS,
    imported,
    logit_difference,
    our_text,
    save_stock,
    some_tokens,
    stock_model,
    their_text,
    transformers,
)
from pyper.errors import CheckpointError
from pyper.export import FAMILIES, export_expert
from pyper.mixture import load_mixture
from pyper.nn import Transformer


def expert_of(folder: Path) -> Transformer:
    return load_mixture(folder)[0].expert(0)


@pytest.mark.parametrize(("family", "index"), CASES)
def test_a_stock_model_computes_here_what_it_computes_there(
    family: str, index: int, tmp_path: Path
) -> None:
    stock = stock_model(family, **VARIANTS[family][index])
    source = save_stock(tmp_path / "stock", stock, sharded=index % 2 == 1)
    assert (len(list(source.glob("*.safetensors"))) > 1) == (index % 2 == 1)
    facts = imported(source, tmp_path / "seed")
    assert facts["architecture"] == f"{family}ForCausalLM"
    expert = expert_of(tmp_path / "seed")
    assert logit_difference(expert, stock) < 1e-5
    prompt, length = some_tokens(2, 5), expert.config.seq_len
    assert torch.equal(our_text(expert, prompt, length), their_text(stock, prompt, length))


def test_parameters_are_told_apart(tmp_path: Path) -> None:
    """The comparison above fails when two matrices of one shape change places."""
    stock = stock_model("Llama")
    imported(save_stock(tmp_path / "stock", stock), tmp_path / "seed")
    expert = expert_of(tmp_path / "seed")
    attention = stock.model.layers[1].self_attn
    attention.q_proj, attention.k_proj = attention.k_proj, attention.q_proj
    assert logit_difference(expert, stock) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", VARIANTS)
def test_there_and_back_again_keeps_every_bit(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    stock = stock_model(family, **VARIANTS[family][1]).to(dtype)
    source = save_stock(tmp_path / "stock", stock)
    imported(source, tmp_path / "seed")
    export_expert(expert_of(tmp_path / "seed"), tmp_path / "out", shard_bytes=10**9)
    before, after = (load_file(f / "model.safetensors") for f in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == dtype
        assert torch.equal(tensor, after[name]), name


@pytest.mark.parametrize(
    ("name", "dtype"), [("keep", torch.bfloat16), ("fp32", torch.float32), ("fp16", torch.float16)]
)
def test_the_type_of_the_weights_is_kept_or_chosen(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = save_stock(tmp_path / "stock", stock_model("Llama").to(torch.bfloat16))
    assert imported(source, tmp_path / "seed", dtype=name)["dtype"] in str(dtype)
    assert {p.dtype for p in expert_of(tmp_path / "seed").parameters()} == {dtype}


@pytest.mark.parametrize("dtype", ["keep", "bf16"])
def test_the_check_compares_with_transformers(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_stock(tmp_path / "stock", stock_model("Qwen3", head_dim=4))
    facts = imported(source, tmp_path / "seed", check=True, dtype=dtype)
    assert facts["check"]["largest_logit_difference"] < 1e-4
    monkeypatch.setattr("pyper.nn.rope.attention_scale", lambda scaling: 1.01)
    with pytest.raises(CheckpointError, match="logits differ"):
        imported(source, tmp_path / "other", check=True)
    assert not (tmp_path / "other").exists()


def test_a_check_that_transformers_refuses_is_an_error_for_people(tmp_path: Path) -> None:
    source = save_stock(tmp_path / "stock", stock_model("Llama"))
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(values | {"attention_bias": None}))
    with pytest.raises(CheckpointError, match=r"transformers cannot load .*attention_bias"):
        imported(source, tmp_path / "seed", check=True)
    assert not (tmp_path / "seed").exists()
    imported(source, tmp_path / "seed")


def test_a_window_shortens_the_context_and_that_is_said(tmp_path: Path) -> None:
    source = save_stock(tmp_path / "stock", stock_model("Mistral", sliding_window=20))
    facts = imported(source, tmp_path / "seed")
    assert facts["context"] == 20 < CONTEXT
    assert "sliding_window" in facts["notes"][0]


@pytest.mark.parametrize(
    ("changes", "context"),
    [
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}, CONTEXT),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, 16),
        ({"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 1}, CONTEXT),
    ],
)
def test_only_layers_that_slide_shorten_it(
    changes: dict[str, Any], context: int, tmp_path: Path
) -> None:
    stock = stock_model("Qwen2", **changes)
    imported(save_stock(tmp_path / "stock", stock), tmp_path / "seed")
    expert = expert_of(tmp_path / "seed")
    assert expert.config.seq_len == context
    assert logit_difference(expert, stock) < 1e-5


@pytest.mark.parametrize(
    ("kept", "interval", "layers"), [(True, 2, (1, 3)), (True, 3, (2,)), (False, 4, (3,))]
)
def test_layers_without_positions_may_be_said_by_an_interval(
    kept: bool, interval: int, layers: tuple[int, ...], tmp_path: Path
) -> None:
    stock = stock_model("SmolLM3", num_hidden_layers=5, no_rope_layer_interval=interval)
    source = save_stock(tmp_path / "stock", stock)
    values = json.loads((source / "config.json").read_text())
    for key in ("no_rope_layers", *(() if kept else ("no_rope_layer_interval",))):
        del values[key]
    (source / "config.json").write_text(json.dumps(values))
    imported(source, tmp_path / "seed")
    expert = expert_of(tmp_path / "seed")
    assert expert.config.no_rope_layers == layers
    assert logit_difference(expert, stock) < 1e-5


@pytest.mark.parametrize("kind", FAMILIES)
def test_absent_keys_mean_what_they_mean_to_transformers(kind: str) -> None:
    family = FAMILIES[kind]
    stock = getattr(transformers, family.architecture.replace("ForCausalLM", "Config"))
    fields = stock.__dataclass_fields__
    for key in ("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings"):
        if key in fields:
            assert family.default(key) == fields[key].default, key
    for key in ("rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias"):
        if key in fields:
            assert family.default(key) == fields[key].default, key
    for key in ("sliding_window", "use_sliding_window", "bos_token_id", "eos_token_id"):
        if key in fields and (kind, key) != ("smollm3", "sliding_window"):
            assert family.default(key) == fields[key].default, key
    assert family.default("rope_theta") == stock.default_theta
