"""AdamW groups, Muon, clipping, exact weights and states."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import (
    SEQ_LEN,
    Train,
    give_gradients,
    new_config,
    new_model,
    random_gradients,
    weights_of,
)
from torch import Tensor

from pyper.checkpoint import flatten_state, same_state, unflatten_state
from pyper.config import ExpertConfig
from pyper.data import Batch
from pyper.errors import CheckpointError, InterruptedRun, NonFiniteError
from pyper.nn import Transformer, init_weights
from pyper.train import next_token_loss
from pyper.train.loss import LossSum
from pyper.train.optimizer import ExpertOptimizer
from pyper.train.step import train_step


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("weights", ["split", "stochastic"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_survive_the_way_through_a_checkpoint(
    name: str, dtype: torch.dtype, weights: str, bits: int
) -> None:
    def step(model: Transformer, optimizer: ExpertOptimizer, seed: int) -> None:
        give_gradients(model, random_gradients(seed), optimizer)
        optimizer.step(1.0)

    config = new_config(optimizer=name, weights=weights, state_bits=bits)
    model = new_model(dtype)
    optimizer = ExpertOptimizer(model, config, 3e-3)
    for seed in range(3):
        step(model, optimizer, seed)
    tensors, skeleton = flatten_state(optimizer.state_dict())
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    twin = new_model(dtype)
    twin.load_state_dict(weights_of(model))
    other = ExpertOptimizer(twin, config, 3e-3)
    other.load_state_dict(unflatten_state(tensors, skeleton))
    assert same_state(other.state_dict(), optimizer.state_dict())

    step(model, optimizer, 9)
    step(twin, other, 9)

    ours, theirs = weights_of(model), weights_of(twin)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_loaded_state_brings_no_settings_along(name: str) -> None:
    """The seed ends with its own; an expert may differ in rate, decay and momentum."""
    model = new_model()
    before = ExpertOptimizer(model, new_config(optimizer=name), 3e-3)
    give_gradients(model, random_gradients(0), before)
    before.step(0.01)
    start = weights_of(model)
    own = new_config(optimizer=name, weight_decay=0.5)
    loaded = ExpertOptimizer(model, own, 1e-3)
    loaded.load_state_dict(before.state_dict())
    for moment in moments_of(loaded):
        moment.zero_()
    give_gradients(model, torch.zeros_like, loaded)
    loaded.step(1.0)

    head = weights_of(model)["head.weight"]
    torch.testing.assert_close(head, start["head.weight"] * (1 - 1e-3 * 0.5))


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize(("bits", "other"), [(8, 32), (32, 8)])
def test_an_expert_goes_on_from_states_of_other_bits(name: str, bits: int, other: int) -> None:
    model = new_model()
    before = ExpertOptimizer(model, new_config(optimizer=name, state_bits=bits), 3e-3)
    for seed in range(3):
        give_gradients(model, random_gradients(seed), before)
        before.step(1.0)
    loaded = ExpertOptimizer(model, new_config(optimizer=name, state_bits=other), 3e-3)
    loaded.load_state_dict(before.state_dict())
    again = ExpertOptimizer(model, new_config(optimizer=name, state_bits=32), 3e-3)
    again.load_state_dict(loaded.state_dict())
    exact = ExpertOptimizer(model, new_config(optimizer=name, state_bits=32), 3e-3)
    exact.load_state_dict(before.state_dict())

    for moment, expected in zip(moments_of(again), moments_of(exact), strict=True):
        assert expected.any()
        # the code reaches down to 7e-4 of the largest, within 4.2 %
        torch.testing.assert_close(
            moment, expected, rtol=0.045, atol=1e-3 * float(expected.abs().max())
        )


def moments_of(optimizer: ExpertOptimizer) -> list[Tensor]:
    """All tensors of the optimizers' states."""
    tensors, _ = flatten_state({"all": optimizer.state_dict()["optimizers"]})
    return [tensors[name] for name in sorted(tensors)]


def test_small_updates_that_bf16_would_lose_add_up() -> None:
    model = new_model(torch.bfloat16)
    config = new_config(precision="bf16", weight_decay=0.0, gradient_clip=None)
    optimizer = ExpertOptimizer(model, config, 1e-4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    optimizer = ExpertOptimizer(model, config, 1e-4)
    for _ in range(200):
        give_gradients(model, torch.ones_like, optimizer)
        optimizer.step(1.0)

    # one update of 1e-4 is far below bf16's step of 4e-3 at 1; 200 of them are not
    expected = torch.tensor(1.0 - 200e-4).bfloat16()
    for parameter in model.parameters():
        assert parameter.dtype == torch.bfloat16
        torch.testing.assert_close(parameter, expected.expand_as(parameter), rtol=0, atol=4e-3)


def test_bf16_gradients_are_summed_in_float32() -> None:
    model = new_model(torch.bfloat16)
    optimizer = ExpertOptimizer(model, new_config(gradient_clip=None), 1e-4)
    give_gradients(model, torch.ones_like, optimizer)
    for _ in range(100):
        give_gradients(model, lambda p: torch.full_like(p, 2.0**-9), optimizer)

    n = sum(parameter.numel() for parameter in model.parameters())
    norm = float(optimizer.clip_gradients())
    assert norm == pytest.approx((1 + 100 * 2.0**-9) * n**0.5, rel=1e-4)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_pulls_matrices_and_nothing_else(name: str) -> None:
    model = new_model()
    before = weights_of(model)
    optimizer = ExpertOptimizer(model, new_config(optimizer=name, weight_decay=0.5), 1e-2)
    give_gradients(model, torch.zeros_like, optimizer)
    optimizer.step(1.0)

    for key, weight in weights_of(model).items():
        decays = key == "head.weight" or (key.startswith("blocks.") and weight.ndim == 2)
        rate = 1e-2
        if name == "muon" and key.startswith("blocks."):
            rate = 0.02 * 1e-2 / 3e-3
        expected = before[key] * (1 - rate * 0.5) if decays else before[key]
        torch.testing.assert_close(weight, expected, msg=key)


def test_a_tied_head_is_an_embedding_and_does_not_decay() -> None:
    config = ExpertConfig(vocab_size=257, seq_len=16, d_model=16, n_heads=2, tie_embeddings=True)
    model = Transformer(config)
    init_weights(model, 0)
    before = model.head.weight.detach().clone()
    optimizer = ExpertOptimizer(model, new_config(weight_decay=0.5), 1e-2)
    give_gradients(model, torch.zeros_like, optimizer)
    optimizer.step(1.0)
    assert torch.equal(model.head.weight, before)


@pytest.mark.parametrize(("clip", "expected"), [(1.0, 1.0), (1e9, None), (None, None)])
def test_clipping_limits_the_norm_of_all_gradients_together(
    clip: float | None, expected: float | None
) -> None:
    model = new_model()
    optimizer = ExpertOptimizer(model, new_config(gradient_clip=clip), 1e-3)
    give_gradients(model, torch.ones_like, optimizer)
    n = sum(parameter.numel() for parameter in model.parameters())

    norm = float(optimizer.clip_gradients(scale=torch.tensor(0.5)))

    assert norm == pytest.approx(0.5 * n**0.5)
    optimizer.step(1.0)
    means = [state["mean"]["values"] for state in optimizer.state_dict()["optimizers"][0].values()]
    after = sum(float(mean.square().sum()) for mean in means) ** 0.5 / (1 - 0.9)
    assert after == pytest.approx(expected or norm, rel=1e-4)


OPTIONS = [
    {"optimizer": "adamw"},
    {"optimizer": "muon"},
    {"optimizer": "adamw8bit"},
    {"optimizer": "muon", "state_bits": 8, "weights": "stochastic"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("n_parts", [1, 2])
def test_a_gradient_that_is_not_finite_touches_neither_weights_nor_states(
    options: dict[str, Any], n_parts: int
) -> None:
    def batch() -> Batch:
        tokens = torch.randint(257, (4, SEQ_LEN + 1))
        return Batch(tokens[:, :-1], tokens[:, 1:])

    def poisoned_loss(model: Transformer, batch: Batch) -> LossSum:
        loss = next_token_loss(model, batch)
        nothing = (0 * model.head.weight.float().sum()).sqrt()  # 0, with a gradient of NaN
        return replace(loss, total=loss.total + nothing)

    torch.manual_seed(0)
    model = new_model(torch.bfloat16)
    optimizer = ExpertOptimizer(model, new_config(**options), 3e-3)
    for _ in range(2):
        train_step(model, batch().split(4 // n_parts), optimizer, 1.0, next_token_loss)
    weights, state = weights_of(model), optimizer.state_dict()
    tensors, skeleton = flatten_state(state)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    with pytest.raises(NonFiniteError):
        train_step(model, batch().split(4 // n_parts), optimizer, 1.0, poisoned_loss)

    assert all(torch.equal(w, weights[name]) for name, w in weights_of(model).items())
    assert same_state(optimizer.state_dict(), unflatten_state(tensors, skeleton))
    assert all(p.grad is None for p in model.parameters())
    # and the next step is as if nothing had been
    train_step(model, batch().split(4 // n_parts), optimizer, 1.0, next_token_loss)
    assert all(w.isfinite().all() for w in weights_of(model).values())


def test_one_bf16_gradient_is_used_as_it_is_and_several_take_float32_sums() -> None:
    model = new_model(torch.bfloat16)
    optimizer = ExpertOptimizer(model, new_config(), 1e-4)
    given = torch.ones_like(model.head.weight)
    model.head.weight.grad = given
    optimizer.collect_gradients()
    [weight] = [w for w in optimizer._weights if w.parameter is model.head.weight]
    assert weight.grad is given
    assert model.head.weight.grad is None
    for _ in range(2):
        model.head.weight.grad = torch.full_like(given, 2.0**-9)
        optimizer.collect_gradients()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert (weight.grad == 1 + 2 * 2.0**-9).all()


def test_rounding_at_random_learns_what_rounding_to_the_nearest_loses() -> None:
    """200 updates of 1e-4 from 1, each a fortieth of bf16's step there."""
    model = new_model(torch.bfloat16)
    config = new_config(weights="stochastic", weight_decay=0.0, gradient_clip=None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    optimizer = ExpertOptimizer(model, config, 1e-4)
    for _ in range(200):
        give_gradients(model, torch.ones_like, optimizer)
        optimizer.step(1.0)
    assert not optimizer.state_dict()["low"]
    means = [float(p.detach().float().mean()) for p in model.parameters() if p.numel() > 1000]
    assert means == pytest.approx([1 - 200e-4] * len(means), abs=1e-3)


@pytest.mark.parametrize("options", OPTIONS[2:], ids=lambda o: "-".join(map(str, o.values())))
def test_states_of_8_bits_and_random_roundings_resume_to_the_bit(
    train: Train, tmp_path: Path, options: dict[str, Any]
) -> None:
    config = new_config(precision="bf16", micro_batch_size=2, **options)
    _, whole = train(tmp_path / "whole", config, dtype=torch.bfloat16)
    with pytest.raises(InterruptedRun):
        train(tmp_path / "cut", config, dtype=torch.bfloat16, should_stop=lambda step: step == 4)

    _, resumed = train(tmp_path / "cut", config, dtype=torch.bfloat16)

    assert all(torch.equal(weight, whole[name]) for name, weight in resumed.items())


def test_a_state_of_the_format_before_is_refused_in_words() -> None:
    optimizer = ExpertOptimizer(new_model(), new_config(), 3e-3)
    with pytest.raises(CheckpointError, match="older format"):
        optimizer.load_state_dict({"optimizers": [], "masters": []})
