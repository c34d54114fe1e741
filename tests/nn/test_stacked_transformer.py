"""Experts side by side read what each alone would read, and learn what each alone would learn."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from small_experts import BOS, small_expert, text_of
from torch import Tensor

from kernels.on_triton import DEVICE, kernels, needs_triton
from pyper.nn import Transformer
from pyper.nn.fp8_linear import use_fp8
from pyper.nn.stacked_transformer import StackedTransformer, stacking_kind

N_EXPERTS = 3
KINDS: list[dict[str, Any]] = [
    {},
    {"n_kv_heads": 2, "qk_norm": True, "activation": "swiglu"},
    {"qk_norm": True, "qk_norm_over": "projection", "norm_position": "post", "n_kv_heads": 1},
    {"attention_bias": True, "attention_output_bias": True, "feed_forward_bias": True},
    {"activation": "relu2", "no_rope_layers": (1,), "head_dim": 6},
    {"attend_across_documents": False, "activation": "gelu_tanh"},
    {"tie_embeddings": True, "rope_scaling": {"kind": "linear", "factor": 2.0}},
]


def experts(**changes: Any) -> list[Transformer]:
    return [small_expert(seed, **changes).double().train() for seed in range(N_EXPERTS)]


def texts() -> Tensor:
    tokens = torch.stack([text_of(2, 9, seed=seed) for seed in range(N_EXPERTS)])
    tokens[:, 0, 4] = BOS
    return tokens


def loss_of(models: list[Transformer], states: Sequence[Tensor]) -> Tensor:
    return torch.stack([m.head(s).sin().sum() for m, s in zip(models, states, strict=True)]).sum()


def grads_of(model: Transformer) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", [0, 1])
@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_states_and_gradients_are_those_of_each_model_alone(
    changes: dict[str, Any], recompute: int
) -> None:
    models, tokens = experts(**changes), texts()
    for model in models:
        model.recompute_blocks = recompute
    assert len({stacking_kind(m) for m in models}) == 1
    alone = [m.hidden(t).flatten(0, 1) for m, t in zip(models, tokens, strict=True)]
    loss_of(models, alone).backward()
    expected = [grads_of(m) for m in models]
    for model in models:
        model.zero_grad()

    together = StackedTransformer(models).read(tokens)
    loss_of(models, together.unbind()).backward()
    torch.testing.assert_close(together, torch.stack(alone))
    for model, grads in zip(models, expected, strict=True):
        torch.testing.assert_close(grads_of(model), grads)


@needs_triton
@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_kernels_read_and_learn_the_same(changes: dict[str, Any]) -> None:
    models = [model.float().to(DEVICE) for model in experts(**changes)]
    tokens = texts().to(DEVICE)
    plain = StackedTransformer(models).read(tokens)
    loss_of(models, plain.unbind()).backward()
    expected = [grads_of(m) for m in models]
    for model in models:
        model.zero_grad()
    with kernels():
        states = StackedTransformer(models).read(tokens)
        loss_of(models, states.unbind()).backward()
    torch.testing.assert_close(states, plain, rtol=1e-4, atol=1e-4)
    for model, grads in zip(models, expected, strict=True):
        torch.testing.assert_close(grads_of(model), grads, rtol=1e-3, atol=2e-4)


@pytest.mark.filterwarnings("ignore")  # the compiler warns of what it does itself
def test_compiled_blocks_are_one_graph_and_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    models, tokens = experts(qk_norm=True), texts()
    plain = StackedTransformer(models).read(tokens)
    compiler = partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", compiler)
    for model in models:
        model.compile_blocks()
    torch.compiler.reset()
    states = StackedTransformer(models).read(tokens)
    loss_of(models, states.unbind()).backward()
    torch.testing.assert_close(states, plain)
    assert len(grads_of(models[0])) == len(list(models[0].parameters()))


def test_a_poisoned_expert_leaves_the_others_alone() -> None:
    models, tokens = experts(), texts()
    with torch.no_grad():
        models[1].get_parameter("blocks.0.feed_forward.up.weight")[0, 0] = torch.nan
    states = StackedTransformer(models).read(tokens)
    states.sum().backward()
    assert not states[1].isfinite().all()
    for number in (0, 2):
        assert states[number].isfinite().all()
        assert all(grad.isfinite().all() for grad in grads_of(models[number]).values())


def test_gradients_are_taken_over_without_a_copy() -> None:
    models = experts()
    StackedTransformer(models).read(texts()).sum().backward()
    for name, _ in models[0].blocks.named_parameters():
        grads = [m.blocks.get_parameter(name).grad for m in models]
        assert len({g.untyped_storage().data_ptr() for g in grads if g is not None}) == 1, name


def test_frozen_parts_get_no_gradients() -> None:
    models = experts()
    models[0].embedding.weight.requires_grad_(False)
    StackedTransformer(models).read(texts()).sum().backward()
    assert models[0].embedding.weight.grad is None
    assert models[1].embedding.weight.grad is not None


def test_what_cannot_be_stacked_is_known() -> None:
    kinds = [stacking_kind(m) for m in (small_expert(), small_expert(d_ff=32))]
    kinds.append(stacking_kind(small_expert().double()))
    assert len({*kinds}) == 3
    assert stacking_kind(small_expert(kind="sparse")) is None
    in_8_bits = small_expert(d_model=16, d_ff=32)
    use_fp8(in_8_bits.blocks)
    assert stacking_kind(in_8_bits) is None
