"""Sparse models in `transformers`: with the modelling file, and as stock architectures."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from export.small_exports import (
    PROMPTS,
    greedy_by_engine,
    greedy_elsewhere,
    logits_of,
    open_elsewhere,
    stepwise_logits,
)
from merge.small_merges import randomize_routers
from mixture.small_mixtures import loaders_of, small_settings
from nn.small_experts import small_expert, text_of
from pyper.config import ExpertConfig, RopeScaling, SparseConfig
from pyper.errors import ConfigError
from pyper.export import mixture_shape
from pyper.export.mixture_hf import export_single
from pyper.export.mixture_shape import exported_shape
from pyper.export.sparse_stock import export_stock, why_not_stock
from pyper.mixture import Mixture
from pyper.nn import Transformer
from pyper.nn.router_state import RouterState

pytestmark = pytest.mark.usefixtures("one_thread")

Case = tuple[dict[str, Any], dict[str, Any]]
CHOSEN = {"routing": "token_choice", "n_experts": 3}
BY_EXPERTS: list[Case] = [
    ({}, {}),
    (
        {"gate": "sigmoid", "n_experts": 3, "shared_d_ff": 8},
        {"activation": "swiglu", "tie_embeddings": True, "n_kv_heads": 2},
    ),
    (
        {"routing": "capped", "max_experts_per_token": 1, "every": 2},
        {
            "activation": "relu2",
            "qk_norm": True,
            "attention_bias": True,
            "attention_output_bias": True,
            "feed_forward_bias": True,
        },
    ),
    ({"attention_experts": 3, "n_experts": 3}, {"activation": "gelu_tanh"}),
    (
        {"routing": "threshold", "gate": "sigmoid"},
        {
            "norm_position": "post",
            "qk_norm": True,
            "qk_norm_over": "projection",
            "no_rope_layers": (0,),
            "rope_scaling": RopeScaling(kind="linear", factor=2.0),
            "attend_across_documents": False,
        },
    ),
]
STOCK: dict[str, Case] = {
    "MixtralForCausalLM": (
        CHOSEN | {"top_k": 2, "normalize_gates": True},
        {
            "activation": "swiglu",
            "n_kv_heads": 2,
            "rope_scaling": RopeScaling(kind="ntk", factor=2),
        },
    ),
    "Qwen3MoeForCausalLM": (
        CHOSEN | {"top_k": 2, "every": 2},
        {
            "activation": "swiglu",
            "qk_norm": True,
            "head_dim": 8,
            "attention_bias": True,
            "attention_output_bias": True,
            "tie_embeddings": True,
            "rope_scaling": RopeScaling(kind="yarn", factor=2.0, original_seq_len=24),
        },
    ),
    "OlmoeForCausalLM": (
        CHOSEN | {"top_k": 1},
        {"activation": "swiglu", "qk_norm": True, "qk_norm_over": "projection"},
    ),
}
TOKEN_CHOICE: list[Case] = [
    *STOCK.values(),
    (CHOSEN | {"gate": "sigmoid", "top_k": 2, "normalize_gates": True}, {}),
]


def sparse_model(case: Case, **changes: Any) -> Transformer:
    """Every router undecided, thresholds among its scores."""
    sparse, shape = case
    model = small_expert(kind="sparse", sparse=SparseConfig(**sparse), **shape | changes)
    randomize_routers(model)
    generator = torch.Generator().manual_seed(5)
    for state in states_of(model):
        if state.sparse.is_expert_choice:
            drawn = torch.rand(state.sparse.n_experts, generator=generator)
            state.set_threshold(0.4 * drawn if state.sparse.gate == "softmax" else drawn - 0.5)
    return model


def states_of(model: Transformer) -> list[RouterState]:
    return [module for module in model.modules() if isinstance(module, RouterState)]


def some_text() -> Tensor:
    tokens = text_of(4, 30)
    tokens[:, 0] = 0
    tokens[1, 9] = 0  # a second document
    return tokens


def as_mixture(model: Transformer) -> Mixture:
    settings = small_settings(experts=("merged",), router="experts", top_k=1)
    return Mixture(settings, loaders_of([model]), None)


@pytest.mark.parametrize("case", [*BY_EXPERTS, *TOKEN_CHOICE], ids=str)
def test_logits_of_the_modelling_file(case: Case, tmp_path: Path) -> None:
    model, tokens = sparse_model(case), some_text()
    assert export_single(model, tmp_path, shard_bytes=9000) == "PyperForCausalLM"
    other = open_elsewhere(tmp_path)
    expected = model(tokens)
    torch.testing.assert_close(logits_of(other, tokens), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(stepwise_logits(other, tokens), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", STOCK)
def test_logits_of_stock_architectures(name: str, tmp_path: Path) -> None:
    model, tokens = sparse_model(STOCK[name]), some_text()
    assert export_stock(model, tmp_path, shard_bytes=9000) == name
    assert not list(tmp_path.glob("*.py"))
    other = open_elsewhere(tmp_path)
    assert type(other).__name__ == name
    torch.testing.assert_close(logits_of(other, tokens), model(tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", [*BY_EXPERTS[:3], *TOKEN_CHOICE], ids=str)
def test_greedy_text_is_that_of_the_engine(case: Case, tmp_path: Path) -> None:
    model = sparse_model(case, vocab_size=257)
    expected = greedy_by_engine(as_mixture(model), PROMPTS, 16)
    write = export_stock if why_not_stock(model) is None else export_single
    write(model, tmp_path, shard_bytes=1 << 30)
    assert greedy_elsewhere(open_elsewhere(tmp_path), PROMPTS, 16) == expected


def test_a_dense_model_without_stock_twin_has_the_modelling_file_too(tmp_path: Path) -> None:
    model, tokens = small_expert(qk_norm=True, n_kv_heads=2), some_text()
    export_single(model, tmp_path, shard_bytes=1 << 30)
    other = open_elsewhere(tmp_path)
    torch.testing.assert_close(logits_of(other, tokens), model(tokens), atol=1e-5, rtol=0)


def test_thresholds_decide_and_stay_float32(tmp_path: Path) -> None:
    model, tokens = sparse_model(BY_EXPERTS[0]), some_text()
    export_single(model, tmp_path, shard_bytes=1 << 30)
    narrow = open_elsewhere(tmp_path, dtype=torch.bfloat16)
    state = narrow.decoder.blocks[0].feed_forward.state
    assert torch.equal(state.threshold, states_of(model)[0].threshold)
    other = open_elsewhere(tmp_path)
    with torch.no_grad():  # one expert's bar a little higher: other tokens pass
        other.decoder.blocks[0].feed_forward.state.threshold[0] += 0.05
    assert (logits_of(other, tokens) - model(tokens)).abs().max() > 1e-2


def test_a_model_without_thresholds_lets_everything_pass(tmp_path: Path) -> None:
    model = small_expert(kind="sparse", sparse=SparseConfig(n_experts=2))
    export_single(model, tmp_path, shard_bytes=1 << 30)
    tokens = some_text()
    got = logits_of(open_elsewhere(tmp_path), tokens)
    torch.testing.assert_close(got, model(tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (BY_EXPERTS[0], "choose tokens"),
        ((CHOSEN | {"normalize_gates": True}, {}), "gelu"),
        ((CHOSEN | {"gate": "sigmoid"}, {"activation": "swiglu"}), "sigmoid"),
        ((CHOSEN | {"shared_d_ff": 8}, {"activation": "swiglu"}), "shared"),
        ((CHOSEN, {"activation": "swiglu"}), "divided by their sum"),
        ((CHOSEN | {"normalize_gates": True, "every": 2}, {"activation": "swiglu"}), "n-th"),
        ((CHOSEN | {"attention_experts": 2}, {"activation": "swiglu"}), "several attentions"),
        ((CHOSEN, {"activation": "swiglu", "qk_norm": True, "attention_bias": True}), "some of"),
    ],
    ids=str,
)
def test_what_no_stock_model_computes_is_refused(case: Case, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=reason) as error:
        export_stock(sparse_model(case), tmp_path, shard_bytes=1 << 30)
    assert "--architecture pyper" in error.value.hint


def test_balancing_biases_have_no_stock_twin_but_a_modelling_file(tmp_path: Path) -> None:
    model, tokens = sparse_model(STOCK["MixtralForCausalLM"]), some_text()
    without = model(tokens)
    states_of(model)[0].balance_bias[1] = 0.3
    assert why_not_stock(model) == "its routers have learnt balancing biases"
    export_single(model, tmp_path, shard_bytes=1 << 30)
    got = logits_of(open_elsewhere(tmp_path), tokens)
    torch.testing.assert_close(got, model(tokens), atol=1e-5, rtol=0)
    assert not torch.allclose(got, without, atol=1e-2)


def test_token_mixtures_are_refused() -> None:
    with pytest.raises(ConfigError, match="token_mixture"):
        exported_shape(ExpertConfig(kind="token_mixture", vocab_size=17, seq_len=8, n_layers=3))


def test_a_key_that_the_modelling_file_does_not_know_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = [key for key in mixture_shape._AS_IT_IS if key != "qk_norm"]
    monkeypatch.setattr(mixture_shape, "_AS_IT_IS", known)
    with pytest.raises(ConfigError, match="qk_norm"):
        exported_shape(ExpertConfig(vocab_size=17, seq_len=8, qk_norm=True, n_heads=8))


def test_the_configuration_says_how_tokens_are_routed(tmp_path: Path) -> None:
    export_single(sparse_model(BY_EXPERTS[1]), tmp_path, shard_bytes=1 << 30)
    sparse = json.loads((tmp_path / "config.json").read_text())["shape"]["sparse"]
    assert sparse["gate"] == "sigmoid"
    assert sparse["n_experts"] == 3
