"""Exported experts are those of `transformers`: equal logits, equal texts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from export.small_stock import logit_difference, open_stock, our_text, their_text
from nn.small_experts import small_expert, text_of
from pyper.config import RopeScaling, SparseConfig
from pyper.errors import ConfigError
from pyper.export import export_expert

SWIGLU = {"activation": "swiglu"}
BOTH = {"attention_bias": True, "attention_output_bias": True}
YARN = RopeScaling(
    kind="yarn", factor=3.0, original_seq_len=16, beta_fast=20.0, mscale=0.5, mscale_all_dim=1.0
)
EXPERTS: list[tuple[str, dict[str, Any]]] = [
    ("ArceeForCausalLM", {}),
    ("ArceeForCausalLM", {"activation": "gelu_tanh", "n_kv_heads": 2}),
    ("ArceeForCausalLM", {"activation": "relu2", "feed_forward_bias": True} | BOTH),
    ("LlamaForCausalLM", SWIGLU),
    ("LlamaForCausalLM", SWIGLU | BOTH | {"feed_forward_bias": True, "head_dim": 6}),
    ("LlamaForCausalLM", SWIGLU | {"tie_embeddings": True, "n_kv_heads": 1}),
    ("LlamaForCausalLM", SWIGLU | {"rope_scaling": YARN, "head_dim": 16}),
    (
        "LlamaForCausalLM",
        SWIGLU | {"rope_scaling": RopeScaling(kind="ntk", factor=2.0), "head_dim": 8},
    ),
    (
        "LlamaForCausalLM",
        SWIGLU | {"rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_seq_len=20)},
    ),
    ("LlamaForCausalLM", SWIGLU | {"rope_scaling": RopeScaling(kind="linear", factor=2.0)}),
    ("Qwen2ForCausalLM", SWIGLU | {"attention_bias": True, "n_kv_heads": 2}),
    ("Qwen2ForCausalLM", SWIGLU | {"attention_bias": True, "head_dim": 6}),
    ("Qwen3ForCausalLM", SWIGLU | {"qk_norm": True}),
    ("Qwen3ForCausalLM", SWIGLU | BOTH | {"qk_norm": True, "head_dim": 6, "n_heads": 3}),
    ("SmolLM3ForCausalLM", SWIGLU | {"no_rope_layers": (1,), "feed_forward_bias": True}),
    (
        "Olmo2ForCausalLM",
        SWIGLU | {"norm_position": "post", "qk_norm": True, "qk_norm_over": "projection"},
    ),
    (
        "Olmo2ForCausalLM",
        SWIGLU
        | BOTH
        | {"norm_position": "post", "qk_norm": True, "qk_norm_over": "projection", "n_kv_heads": 2},
    ),
]


@pytest.mark.parametrize(("architecture", "changes"), EXPERTS)
@pytest.mark.parametrize("shard_bytes", [2_000, 10**9])
def test_an_expert_is_its_stock_twin(
    architecture: str, changes: dict[str, Any], shard_bytes: int, tmp_path: Path
) -> None:
    model = small_expert(**changes)
    assert export_expert(model, tmp_path, shard_bytes=shard_bytes) == architecture
    twin = open_stock(tmp_path)
    assert type(twin).__name__ == architecture
    assert logit_difference(model, twin) < 1e-5
    prompt = text_of(2, 5)
    assert torch.equal(our_text(model, prompt, 40), their_text(twin, prompt, 40))
    n_files = len(list(tmp_path.glob("*.safetensors")))
    assert (n_files > 1) == (shard_bytes < 10**6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_type_of_the_weights_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    model = small_expert(**SWIGLU).to(dtype)
    export_expert(model, tmp_path, shard_bytes=10**9)
    twin = open_stock(tmp_path)
    assert twin.dtype == dtype
    assert torch.equal(twin.lm_head.weight, model.head.weight)


def test_a_text_ends_where_the_next_document_would_begin(tmp_path: Path) -> None:
    export_expert(small_expert(bos_id=3), tmp_path, shard_bytes=10**9)
    for file in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / file).read_text())
        assert (values["bos_token_id"], values["eos_token_id"]) == (3, 3)


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("kind", {"kind": "sparse", "sparse": SparseConfig(n_experts=2)}),
        ("qk_norm", {"qk_norm": True}),
        ("norm_position", {"norm_position": "post"}),
        ("norm_position", SWIGLU | {"qk_norm": True, "qk_norm_over": "projection"}),
        ("qk_norm_over", SWIGLU | {"norm_position": "post", "qk_norm": True}),
        ("attention_output_bias", {"attention_bias": True}),
        ("attention_output_bias", SWIGLU | {"attention_output_bias": True}),
        ("no_rope_layers", {"no_rope_layers": (0,)}),
        ("feed_forward_bias", SWIGLU | {"feed_forward_bias": True, "qk_norm": True}),
        ("n_heads", SWIGLU | {"n_heads": 3, "head_dim": 4}),
        ("seq_len", {"seq_len": 0}),
    ],
)
def test_what_has_no_twin_is_refused_by_the_name_of_its_key(
    key: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"`model.{key}") as caught:
        export_expert(small_expert(**changes), tmp_path / "out", shard_bytes=10**9)
    assert caught.value.hint
    assert not (tmp_path / "out").exists()
