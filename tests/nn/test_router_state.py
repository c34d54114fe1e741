"""Thresholds and biases: moved once per optimizer step, never in evaluation, never rounded."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from nn.small_experts import small_config, small_expert, text_of
from pyper.config import SparseConfig
from pyper.mixture.expert_folder import build_expert, model_tensors
from pyper.nn import KVCache, Transformer
from pyper.nn.router_state import RouterState

DECAY = 0.9
SETTINGS: dict[str, dict[str, Any]] = {
    "expert_choice": {},
    "sigmoid": {"gate": "sigmoid"},
    "threshold": {"routing": "threshold"},
    "capped": {"routing": "capped"},
    "loss": {"routing": "token_choice"},
    "sign_bias": {"routing": "token_choice", "balance": "sign_bias"},
    "quantile_bias": {"routing": "token_choice", "balance": "quantile_bias", "bias_rate": 0.5},
    "token_mixture": {},
}


def routed_model(name: str, **changes: Any) -> Transformer:
    """Two layers, four experts."""
    kind = "token_mixture" if name == "token_mixture" else "sparse"
    sparse = SparseConfig(n_experts=4, threshold_decay=DECAY, **SETTINGS[name] | changes)
    return small_expert(kind=kind, sparse=sparse)


def states_of(model: Transformer) -> list[RouterState]:
    return [module for module in model.modules() if isinstance(module, RouterState)]


def after_steps(name: str, n: int = 5, **changes: Any) -> Transformer:
    """Trained to the extent that thresholds and biases have moved; in evaluation mode."""
    model = routed_model(name, **changes).train()
    for step in range(n):
        model.begin_step(step / n)
        for part in range(2):
            model(text_of(4, 12, seed=10 * step + part))
        model.end_step()
    return model.eval()


def state_bits(model: Transformer) -> dict[str, Tensor]:
    return copy.deepcopy(dict(model.state_dict()))


def assert_identical(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def kth_scores(model: Transformer, tokens: Tensor) -> list[Tensor]:
    """Of each routed layer, observed on a copy."""
    probe = copy.deepcopy(model).train()
    for state in states_of(probe):
        state._forget()
    probe(tokens)
    return [state._kth_scores[0] for state in states_of(probe)]


@pytest.mark.parametrize("name", ["expert_choice", "sigmoid", "threshold", "token_mixture"])
@torch.no_grad()
def test_a_step_takes_in_the_mean_over_its_micro_batches_once(name: str) -> None:
    model = routed_model(name).train()
    expected = [torch.zeros(4) for _ in states_of(model)]
    for step in range(3):
        parts = [text_of(2, 12, seed=10 * step + part) for part in range(3)]
        for layer, scores in enumerate(zip(*(kth_scores(model, p) for p in parts), strict=True)):
            mean = torch.stack(scores).mean(dim=0)
            expected[layer] = DECAY * expected[layer] + (1 - DECAY) * mean
        before = [state.threshold for state in states_of(model)]
        for part in parts:
            model(part)
        assert all(map(torch.equal, before, (s.threshold for s in states_of(model))))
        model.end_step()
        model.end_step()  # nothing was observed since
        for state, total in zip(states_of(model), expected, strict=True):
            assert int(state.threshold_updates) == step + 1
            torch.testing.assert_close(state.threshold, total / (1 - DECAY ** (step + 1)))


@torch.no_grad()
def test_capped_choice_observes_the_kth_score_of_plain_expert_choice() -> None:
    """The cap reaches down to tokens that others could not take."""
    capped = routed_model("capped", max_experts_per_token=1, capacity_factor=0.9).train()
    plain = routed_model("expert_choice", capacity_factor=0.9).train()
    plain.load_state_dict(capped.state_dict())
    tokens = text_of(4, 12)
    assert torch.equal(kth_scores(capped, tokens)[0], kth_scores(plain, tokens)[0])
    chosen = capped.read(tokens).routed[0].statistics.fan_out
    assert float(chosen[2:].sum()) == 0 < float(chosen[1])


@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_evaluation_and_decoding_leave_every_bit_alone(name: str) -> None:
    model = after_steps(name)
    before = state_bits(model)
    for seed in range(5):
        tokens = text_of(3, 16, seed=seed)
        model(tokens)
        model.read(tokens, rule="expert_choice")
        model.read(tokens, rule="threshold", padding=torch.arange(16).expand(3, -1) > 10)
        cache = KVCache.allocate(model.config, 3, 16, device=model.device, dtype=model.dtype)
        model.extend(tokens[:, :9], cache)
        for t in range(9, 16):
            model.extend(tokens[:, t : t + 1], cache, torch.tensor([1, 0, 1]))
        model.end_step()
    assert_identical(state_bits(model), before)
    model.train()
    model.end_step()  # what evaluation read is not waiting to be counted
    assert_identical(state_bits(model), before)


@pytest.mark.parametrize("name", SETTINGS)
def test_half_precision_leaves_thresholds_and_biases_alone(name: str) -> None:
    model = after_steps(name)
    before = [state_bits(state) for state in states_of(model)]  # type: ignore[arg-type]
    model = model.to(torch.bfloat16).to(model.device).half().bfloat16()
    assert model.dtype == torch.bfloat16
    for state, bits in zip(states_of(model), before, strict=True):
        assert_identical(dict(state.state_dict()), bits)
        assert state.threshold_total.dtype == state.balance_bias.dtype == torch.float32
        assert state.threshold_updates.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_a_saved_model_comes_back_with_the_same_thresholds(name: str, dtype: torch.dtype) -> None:
    model = after_steps(name).to(dtype)
    saved = {key: tensor.clone() for key, tensor in model_tensors(model).items()}
    copy_of_it = build_expert(model.config, saved, device=torch.device("cpu"))
    assert_identical(dict(copy_of_it.state_dict()), dict(model.state_dict()))
    assert not copy_of_it.training
    tokens = text_of(2, 12)
    assert torch.equal(copy_of_it(tokens), model(tokens))
    moved = [float(state.threshold_total.abs().sum()) for state in states_of(copy_of_it)]
    moved += [float(state.balance_bias.abs().sum()) for state in states_of(copy_of_it)]
    assert any(moved) is (name != "loss")


@pytest.mark.parametrize("name", ["sign_bias", "quantile_bias"])
@torch.no_grad()
def test_a_bias_moves_against_the_load_of_all_micro_batches(name: str) -> None:
    model = routed_model(name).train()
    state = states_of(model)[0]
    parts = [text_of(4, 12), text_of(4, 12, seed=1), torch.full((1, 2), 3)]
    loads = [model.read(part).routed[0].statistics.expert_load for part in parts]
    load = torch.stack(loads).sum(dim=0)
    assert not torch.equal((loads[-1].mean() - loads[-1]).sign(), (load.mean() - load).sign())
    assert not state.balance_bias.any()
    model.end_step()
    if name == "sign_bias":
        expected = state.sparse.bias_rate * (load.mean() - load).sign()
        assert torch.equal(state.balance_bias, expected)
    moved_up = state.balance_bias - state.balance_bias.mean()
    assert moved_up[load.argmax()] < 0 < moved_up[load.argmin()]
    once = state.balance_bias.clone()
    model.end_step()
    assert torch.equal(state.balance_bias, once)


@pytest.mark.parametrize("name", ["sign_bias", "quantile_bias"])
@torch.no_grad()
def test_biases_even_out_the_load(name: str) -> None:
    rate = 0.02 if name == "sign_bias" else 0.5
    model = routed_model(name, bias_rate=rate).train()

    def violation() -> float:
        statistics = model.read(text_of(16, 24, seed=99)).routed[0].statistics
        states_of(model)[0]._forget()
        return float(statistics.expert_load.max() / statistics.expert_load.mean())

    before = violation()
    for step in range(40):
        model(text_of(16, 24, seed=step))
        model.end_step()
    assert before > 1.5
    assert violation() < 1 + (before - 1) / 2


@torch.no_grad()
def test_without_biases_none_moves() -> None:
    for state in states_of(after_steps("loss")):
        assert not state.balance_bias.any()


@torch.no_grad()
def test_threshold_routing_begins_after_its_share_of_the_steps() -> None:
    model = after_steps("threshold", threshold_after=0.2).train()
    tokens = text_of(4, 12)

    def loads(share: float) -> list[float]:
        model.begin_step(share)
        return model.read(tokens).routed[0].statistics.expert_load.tolist()

    assert loads(0.0) == loads(0.19) == [12.0] * 4
    by_threshold = loads(0.2)
    assert by_threshold == loads(1.0) != [12.0] * 4
    model.eval()
    assert loads(0.0) == by_threshold


@torch.no_grad()
def test_thresholds_go_on_moving_while_they_decide() -> None:
    model = after_steps("threshold", threshold_after=0.2).train()
    before = [state.threshold for state in states_of(model)]
    model.begin_step(0.5)
    model(text_of(4, 12, seed=77))
    model.end_step()
    for state, old in zip(states_of(model), before, strict=True):
        assert not torch.equal(state.threshold, old)


@torch.no_grad()
def test_what_was_read_before_a_step_began_does_not_count() -> None:
    """Such as the pass that finds out how large a micro-batch fits."""
    models = [routed_model("expert_choice").train() for _ in range(2)]
    models[1](torch.zeros(2, 12, dtype=torch.long))
    for model in models:
        model.begin_step(0.0)
        model(text_of(4, 12))
        model.end_step()
    assert_identical(state_bits(models[1]), state_bits(models[0]))


@torch.no_grad()
def test_before_the_first_step_every_token_passes() -> None:
    model = routed_model("expert_choice")
    statistics = model.read(text_of(2, 12)).routed[0].statistics
    assert statistics.expert_load.tolist() == [24.0] * 4
    assert all(bool((s.threshold == -torch.inf).all()) for s in states_of(model))


def test_only_models_with_routers_have_states() -> None:
    assert states_of(Transformer(small_config())) == []
    assert len(states_of(routed_model("expert_choice"))) == 2
    assert len(states_of(routed_model("expert_choice", every=2))) == 1
    assert len(states_of(routed_model("token_mixture"))) == 1
