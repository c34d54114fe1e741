"""Thresholds set anew, from one pool, for the weights as they are."""

import copy

import pytest
import torch

from nn.trained_sparse import CHOOSING, structured_text, trained
from pyper.nn import Transformer
from pyper.nn.router_state import RouterState
from pyper.routing import routing_summary


def a_copy(name: str) -> Transformer:
    return copy.deepcopy(trained(name))


def states_of(model: Transformer) -> list[RouterState]:
    return [module for module in model.modules() if isinstance(module, RouterState)]


@pytest.mark.parametrize("name", [n for n in CHOOSING if "documents" not in n and n != "capped"])
def test_a_calibrated_model_lets_its_capacity_through(name: str) -> None:
    model, tokens = a_copy(name), structured_text(64, seed=9)
    model.calibrate_thresholds(tokens)
    with torch.no_grad():
        routed = model.read(tokens).routed
    sparse = model.config.routing
    capacity = int(sparse.capacity_factor * tokens.numel() / sparse.n_experts)
    for layer in routed:
        # the k-th itself does not pass; saturated gates may be equal
        assert ((layer.statistics.expert_load - capacity).abs() <= 0.02 * capacity + 1).all()


def test_the_load_on_other_text_of_the_same_kind_comes_closer_to_the_capacity() -> None:
    text = structured_text(400, seed=123)

    def worst_load(model: Transformer) -> float:
        with torch.no_grad():
            layers = model.read(text).routed
        loads = [routing_summary(layer.statistics)["experts_per_token"] for layer in layers]
        return max(abs(load - 1) for load in loads)

    before, model = worst_load(a_copy("expert choice")), a_copy("expert choice")
    model.calibrate_thresholds(structured_text(400, seed=9))
    assert worst_load(model) < min(before, 0.05)


@pytest.mark.parametrize("name", ["expert choice", "token mixture"])
def test_the_moving_average_goes_on_from_calibrated_thresholds(name: str) -> None:
    model = a_copy(name)
    before = [int(state.threshold_updates) for state in states_of(model)]
    model.calibrate_thresholds(structured_text(32, seed=9))
    for state, updates in zip(states_of(model), before, strict=True):
        assert int(state.threshold_updates) == updates > 0
        decay, old = state.sparse.threshold_decay, state.threshold.clone()
        new = old + 0.125
        state.observe_kth_score(new)
        state.end_step()
        step = (1 - decay) / (1 - decay ** (updates + 1))
        torch.testing.assert_close(state.threshold, old + step * (new - old), atol=1e-6, rtol=1e-5)


def test_calibrating_observes_nothing_and_keeps_the_mode() -> None:
    model = a_copy("expert choice").train()
    model.calibrate_thresholds(structured_text(16, seed=9))
    before = [state.threshold.clone() for state in states_of(model)]
    model.end_step()
    assert model.training
    for state, threshold in zip(states_of(model), before, strict=True):
        assert torch.equal(state.threshold, threshold)


def test_only_models_whose_experts_choose_have_thresholds() -> None:
    assert a_copy("expert choice").has_thresholds
    assert a_copy("token mixture").has_thresholds
    assert not a_copy("top 1, loss").has_thresholds
