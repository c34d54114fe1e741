"""Training of routed models: what is differentiated, logged, remembered, and left alone."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_sparse import MODES, sparse_model
from tiny_training import SEQ_LEN, new_config, new_model, new_plan, trace_of, weights_of
from torch import Tensor

from pyper.checkpoint import load_checkpoint
from pyper.config import TrainConfig
from pyper.data import Batch
from pyper.errors import InterruptedRun, NonFiniteError
from pyper.nn import Transformer
from pyper.routing import load_balancing_loss, router_probs, router_z_loss
from pyper.train import LossSum, TrainingData, next_token_loss, train_expert
from pyper.train.optimizer import ExpertOptimizer
from pyper.train.step import train_step

pytestmark = pytest.mark.usefixtures("one_thread")

KEYS = {
    "experts_per_token",
    "zero_expert_share",
    "max_violation",
    "router_entropy",
    "load_entropy",
    "flip_rate",
    "threshold_gap",
}


def a_batch(seed: int = 0, rows: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(257, (rows, SEQ_LEN + 1), generator=generator)
    return Batch(tokens[:, :-1], tokens[:, 1:], None)


def one_step(model: Transformer, parts: list[Batch], config: TrainConfig) -> Any:
    return train_step(model, parts, ExpertOptimizer(model, config, 3e-3), 1.0, next_token_loss)


def run(
    model: Transformer, data: TrainingData, folder: Path, config: TrainConfig, **options: Any
) -> dict[str, Tensor]:
    train_expert(model, data, config, new_plan(), folder, **options)
    return weights_of(model)


def logits_of_routers(model: Transformer, tokens: Tensor) -> list[Tensor]:
    """(N, E) of each layer."""
    found: list[Tensor] = []

    def keep(layer: Any, inputs: tuple[Any, ...]) -> None:
        found.append(F.linear(inputs[0].flatten(0, 1), layer.router.weight))

    hooks = [b.feed_forward.register_forward_pre_hook(keep) for b in model.blocks]
    model.read(tokens)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("mode", ["loss", "sign_bias"])
def test_the_objective_adds_weighted_auxiliary_losses_that_are_not_reported(mode: str) -> None:
    weights = {"load_balancing_weight": 0.3, "router_z_weight": 0.07}
    model, batch = sparse_model(mode, **weights).train(), a_batch()
    loss = next_token_loss(model, batch)

    n = batch.targets.numel()
    cross_entropy = F.cross_entropy(
        model(batch.tokens).flatten(0, 1), batch.targets.flatten(), reduction="sum"
    )
    torch.testing.assert_close(loss.total, cross_entropy)
    extra = torch.zeros(())
    for logits in logits_of_routers(model, batch.tokens):
        probs = router_probs(logits, "softmax")
        share = F.one_hot(probs.argmax(dim=-1), 3).float().mean(dim=0)
        extra = extra + 0.07 * router_z_loss(logits)
        if mode == "loss":
            extra = extra + 0.3 * load_balancing_loss(probs, share)
    assert float(extra.detach()) > 0.05
    torch.testing.assert_close(loss.objective(), cross_entropy + n * extra)

    before = float(cross_entropy.detach()) / n
    result = one_step(sparse_model(mode, **weights), [batch], new_config())
    assert result.loss == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("mode", ["expert_choice", "threshold", "capped", "token_mixture"])
def test_experts_that_choose_have_no_auxiliary_loss(mode: str) -> None:
    loss = next_token_loss(sparse_model(mode).train(), a_batch())
    assert torch.equal(loss.objective(), loss.total)


def test_auxiliary_losses_are_means_over_the_step_however_it_is_cut() -> None:
    """The z-loss exactly; balancing knows the shares of the choices made so far."""
    batch, results = a_batch(), []
    for size in (6, 2, 1):
        model = sparse_model("loss", load_balancing_weight=0.0, router_z_weight=0.5)
        result = one_step(model, batch.split(size), new_config(adam_eps=1e-3))
        results.append((result.gradient_norm, weights_of(model)))
    for norm, weights in results[1:]:
        assert norm == pytest.approx(results[0][0], rel=1e-4)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, results[0][1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode", ["loss", "sign_bias"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_accumulated_token_choice_without_auxiliary_losses_equals_one_pass(
    mode: str, optimizer: str
) -> None:
    """Expert choice does not: each micro-batch is a pool of its own."""
    off = {"load_balancing_weight": 0.0, "router_z_weight": 0.0}
    config, batch = new_config(optimizer=optimizer, adam_eps=1e-3), a_batch()
    whole, cut = sparse_model(mode, **off), sparse_model(mode, **off)
    one, other = one_step(whole, [batch], config), one_step(cut, batch.split(2), config)
    assert other.loss == pytest.approx(one.loss, rel=1e-5)
    assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-4)
    theirs = weights_of(whole)
    for name, weight in weights_of(cut).items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-3, atol=1e-5)
    for ours, expected in zip(other.routing, one.routing, strict=True):
        assert torch.equal(ours.expert_load, expected.expert_load)


def test_thresholds_take_in_every_micro_batch_of_a_step() -> None:
    model, batch = sparse_model("expert_choice"), a_batch()
    one_step(model, batch.split(2), new_config())
    means = [torch.zeros(3), torch.zeros(3)]
    for part in batch.split(2):
        fresh = sparse_model("expert_choice").train()
        fresh.read(part.tokens)
        for layer, block in enumerate(fresh.blocks):
            means[layer] += block.feed_forward.state._kth_scores[0] / 3
    for block, mean in zip(model.blocks, means, strict=True):
        assert int(block.feed_forward.state.threshold_updates) == 1
        torch.testing.assert_close(block.feed_forward.state.threshold, mean)


def test_a_step_that_fails_moves_no_threshold() -> None:
    model = sparse_model("expert_choice")
    before = weights_of(model)

    def poisoned(model: Transformer, batch: Batch) -> LossSum:
        sums = next_token_loss(model, batch)
        return LossSum(sums.total * math.nan, sums.weight, sums.routed)

    optimizer = ExpertOptimizer(model, new_config(), 3e-3)
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        train_step(model, [a_batch()], optimizer, 1.0, poisoned)
    assert all(torch.equal(t, before[name]) for name, t in weights_of(model).items())


@pytest.mark.parametrize("mode", MODES)
def test_metrics_hold_the_routing_numbers(
    mode: str, training_data: TrainingData, tmp_path: Path
) -> None:
    run(sparse_model(mode).train(), training_data, tmp_path, new_config())

    records = [record for record in trace_of(tmp_path) if "loss" in record]
    assert len(records) == 8
    for record in records:
        assert {k.removeprefix("routing/") for k in record if k.startswith("routing/")} == (
            KEYS | {"load", "fan_out"}
        )
        layers = 1 if mode == "token_mixture" else 2
        assert [len(share) for share in record["routing/load"]] == [3] * layers
        for load, fan_out in zip(record["routing/load"], record["routing/fan_out"], strict=True):
            assert sum(fan_out) == pytest.approx(1, abs=1e-3)
            met = sum(n * share for n, share in enumerate(fan_out))
            assert met == pytest.approx(sum(load), abs=2e-3)
        assert all(math.isfinite(record[f"routing/{key}"]) for key in KEYS)
    last = records[-1]
    mean_load = sum(map(sum, last["routing/load"])) / len(last["routing/load"])
    assert last["routing/experts_per_token"] == pytest.approx(mean_load, abs=1e-3)
    if mode != "threshold":
        C = 21 / 64  # ⌊64 / 3⌋ of 64 tokens
        expected = 1.0 if MODES[mode].get("routing") == "token_choice" else 3 * C
        assert last["routing/experts_per_token"] == pytest.approx(expected, abs=1e-6)
    else:  # a share of 0.4 of eight steps are made by expert choice
        by_choice = [r["routing/experts_per_token"] == pytest.approx(63 / 64) for r in records]
        assert by_choice == [True] * 4 + [False] * 4
    choosing = MODES[mode].get("routing") != "token_choice"
    assert (last["routing/threshold_gap"] > 0) is choosing
    assert (last["routing/flip_rate"] > 0) is choosing


def test_dense_models_log_no_routing(training_data: TrainingData, tmp_path: Path) -> None:
    run(new_model(), training_data, tmp_path, new_config())
    assert not any("routing" in key for record in trace_of(tmp_path) for key in record)


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_stops_and_goes_on_ends_with_the_same_bits(
    mode: str, training_data: TrainingData, tmp_path: Path
) -> None:
    """Weights, thresholds, biases, and every logged number."""
    config = new_config(optimizer="muon", micro_batch_size=2)
    whole = run(sparse_model(mode).train(), training_data, tmp_path / "whole", config)
    for stop in (2, 5):
        with pytest.raises(InterruptedRun):
            run(
                sparse_model(mode).train(),
                training_data,
                tmp_path / "cut",
                config,
                should_stop=lambda step, stop=stop: step == stop,
            )
    resumed = run(sparse_model(mode).train(), training_data, tmp_path / "cut", config)

    assert resumed.keys() == whole.keys()
    assert any("threshold_total" in name for name in whole)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert trace_of(tmp_path / "cut") == trace_of(tmp_path / "whole")


def test_bf16_training_keeps_thresholds_in_float32(
    training_data: TrainingData, tmp_path: Path
) -> None:
    model = sparse_model("expert_choice").to(torch.bfloat16).train()
    weights = run(model, training_data, tmp_path, new_config(precision="bf16"))

    saved = load_checkpoint(tmp_path / "best").model
    for name, tensor in saved.items():
        is_state = ".state." in name
        assert tensor.dtype == torch.bfloat16 or is_state
        assert torch.equal(tensor, weights[name])
    total = saved["blocks.0.feed_forward.state.threshold_total"]
    assert total.dtype == torch.float32
    assert not torch.equal(total, total.bfloat16().float())


def test_saved_thresholds_fit_the_weights_they_are_saved_with(
    training_data: TrainingData, tmp_path: Path
) -> None:
    model = sparse_model("expert_choice")
    trained = run(model, training_data, tmp_path / "run", new_config())
    model.calibrate_thresholds(training_data.windows(65_536))
    for name, tensor in weights_of(model).items():
        assert torch.equal(tensor, trained[name]), name
