"""Muon and AdamW over stacked experts; parts that are frozen."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tiny_sparse import sparse_model
from tiny_training import new_config, new_plan, weights_of
from torch import Tensor

from pyper.config.train import Part
from pyper.errors import ConfigError
from pyper.nn import Transformer
from pyper.train import TrainingData, train_expert
from pyper.train.adamw import AdamW
from pyper.train.freeze import freeze, part_of
from pyper.train.muon import Muon
from pyper.train.optimizer import ExpertOptimizer
from pyper.train.trained_weight import TrainedWeight

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}


def random_stack(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [None, (16, 8, 8)])
def test_muon_treats_every_expert_and_each_of_its_parts_as_a_matrix_of_its_own(
    rows: tuple[int, ...] | None,
) -> None:
    """One stacked step equals one step for each matrix, whatever their sizes."""
    start, scale = random_stack(3, 32, 16), torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    stack = TrainedWeight("stack", torch.nn.Parameter(start.clone()))
    apart = [
        TrainedWeight("matrix", torch.nn.Parameter(p.clone()))
        for m in start
        for p in m.split(rows or (32,))
    ]
    whole = Muon([stack], row_splits=[rows], **OPTIONS)
    each = Muon(apart, row_splits=[None] * len(apart), **OPTIONS)
    for step in range(3):
        gradients = scale * random_stack(3, 32, 16, seed=step)
        stack.parameter.grad = gradients
        parts = [p for m in gradients for p in m.split(rows or (32,))]
        for weight, gradient in zip(apart, parts, strict=True):
            weight.parameter.grad = gradient.clone()
        whole.step(torch.tensor(1.0))
        each.step(torch.tensor(1.0))
    together = torch.cat([w.parameter.detach() for w in apart]).view_as(start)
    torch.testing.assert_close(stack.parameter.detach(), together)


def groups_of(model: Transformer) -> tuple[set[str], set[str], set[str]]:
    """Names under Muon, under AdamW with weight decay, and under AdamW without."""
    adamw, muon = ExpertOptimizer(model, new_config(optimizer="muon"), 3e-3)._optimizers
    assert isinstance(adamw, AdamW)
    pairs = list(zip(adamw.weights, adamw.decays, strict=True))
    decayed, others = ({w.name for w, d in pairs if (d > 0) is on} for on in (True, False))
    return {w.name for w in muon.weights}, decayed, others


@pytest.mark.parametrize("mode", ["expert_choice", "loss", "token_mixture"])
def test_muon_takes_the_matrices_of_experts_and_adamw_the_routers(mode: str) -> None:
    model = sparse_model(mode)
    muon, decayed, others = groups_of(model)
    every = {name for name, _ in model.named_parameters()}
    assert muon | decayed | others == every
    assert decayed == {"head.weight"}
    router = "experts" if mode == "token_mixture" else "blocks.0.feed_forward"
    assert f"{router}.router.weight" in others
    for name in every - {"head.weight", "embedding.weight"}:
        is_matrix = name.endswith(("qkv.weight", "out.weight", "up.weight", "down.weight"))
        assert (name in muon) is is_matrix, name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_leaves_routers_and_norms_of_experts_alone(optimizer: str) -> None:
    """Gradients of zero: only decay moves anything."""
    model = sparse_model("token_mixture")
    before = weights_of(model)
    config = new_config(optimizer=optimizer, weight_decay=0.5)
    optimizer_ = ExpertOptimizer(model, config, 3e-3)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer_.step(1.0)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    ends = ("qkv.weight", "out.weight", "up.weight", "down.weight", "head.weight")
    assert moved == {name for name in before if name.endswith(ends)}


@pytest.mark.parametrize("mode", ["expert_choice", "token_mixture"])
def test_a_gradient_of_one_expert_moves_that_expert_alone(mode: str) -> None:
    """And its query, key and value each as far as the other, whichever has the most of it."""
    model = sparse_model(mode)
    mixed = mode == "token_mixture"
    stack = model.experts.layers[0].qkv.weight if mixed else model.blocks[0].feed_forward.up.weight
    heights = (16, 16, 16) if mixed else (24,)
    before = stack.detach().clone()
    config = new_config(optimizer="muon", weight_decay=0.0)
    optimizer = ExpertOptimizer(model, config, 3e-3)
    stack.grad = torch.zeros_like(stack)
    stack.grad[1] = random_stack(*stack[1].shape)
    stack.grad[1, : heights[0]] *= 100
    optimizer.step(1.0)
    change = (stack.detach() - before) / config.muon_learning_rate
    for part in change[1].split(heights):
        values = torch.linalg.svdvals(part) / max(1.0, part.shape[0] / part.shape[1]) ** 0.5
        assert 0.6 < float(values.median()) < 1.3
    assert not change[[0, 2]].any()


@pytest.mark.parametrize(("mode", "optimizer"), [("loss", "adamw"), ("token_mixture", "muon")])
@pytest.mark.parametrize("part", get_args(Part))
def test_frozen_parts_keep_every_bit_and_the_others_move(
    mode: str, optimizer: str, part: Part, training_data: TrainingData, tmp_path: Path
) -> None:
    model = sparse_model(mode).train()
    freeze(model, [part])
    before = weights_of(model)
    config = new_config(optimizer=optimizer, steps=4)
    train_expert(model, training_data, config, new_plan(4), tmp_path)
    after = weights_of(model)
    for name, _ in model.named_parameters():
        assert torch.equal(after[name], before[name]) is (part_of(name) == part), name


def test_every_part_names_something_in_every_kind_of_model() -> None:
    for mode in ("loss", "token_mixture"):
        names = dict(sparse_model(mode).named_parameters())
        assert {part_of(name) for name in names} == set(get_args(Part))
        for name in names:
            if any(word in name for word in ("qkv", "attention.out", "layers.0.out")):
                assert part_of(name) == "attention"
            if any(word in name for word in (".up", ".down")):
                assert part_of(name) == "feed_forward"
            for word, part in (("norm", "norm"), ("router", "router"), ("head", "head")):
                if word in name:
                    assert part_of(name) == part


def test_freezing_everything_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to train") as caught:
        freeze(sparse_model("loss"), get_args(Part))
    assert caught.value.hint
