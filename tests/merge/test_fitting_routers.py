"""Routers without training, and their thresholds."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from merge.small_merges import branches, domains, randomize_routers, token_choice
from nn.small_experts import small_expert, text_of
from pyper.config import SparseConfig
from pyper.errors import ConfigError, DataError
from pyper.merge import (
    fit_router_means,
    fit_router_ridge,
    init_router_random,
    merge_experts,
    ridge_solution,
)
from pyper.nn import Transformer
from pyper.routing import routing_summary

SPARSE = [
    token_choice(top_k=1),
    token_choice(top_k=2, attention_experts=3),
    SparseConfig(n_experts=3),
    SparseConfig(n_experts=3, gate="sigmoid"),
]


def router_inputs(model: Transformer, tokens: torch.Tensor) -> list[torch.Tensor]:
    """(N, D) of each sparse layer, from an ordinary forward pass."""
    seen: list[torch.Tensor] = []
    hooks = [
        block.feed_forward.register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, 1)))
        for block in model.blocks
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return seen


def test_ridge_is_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    x, expert = rng.normal(size=(40, 7)), rng.integers(0, 3, 40)
    y = np.eye(3)[expert]
    expected = np.linalg.inv(x.T @ x + 0.3 * np.eye(7)) @ x.T @ y
    got = ridge_solution(torch.from_numpy(x), torch.from_numpy(expert), 3, 0.3)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sparse", SPARSE)
def test_ridge_sends_separable_domains_to_their_experts(sparse: SparseConfig) -> None:
    merged = merge_experts(branches(d_model=64), sparse)  # wide enough to be separable
    agreement = fit_router_ridge(merged, domains(rows=40))
    routed = {n for n, _ in merged.named_parameters() if n.endswith("router.weight")}
    assert agreement.keys() == {name.removesuffix(".router.weight") for name in routed}
    assert min(agreement.values()) >= 0.95
    for expert, tokens in enumerate(domains(seed=1)):  # text that was not fitted
        for x, block in zip(router_inputs(merged, tokens), merged.blocks, strict=True):
            chosen = block.feed_forward.router(x).argmax(dim=-1)
            assert float((chosen == expert).float().mean()) >= 0.95


def test_domain_means_tell_separable_domains_apart() -> None:
    merged = merge_experts(branches(d_model=64), token_choice(top_k=1))
    agreement = fit_router_means(merged, domains())
    assert min(agreement.values()) >= 0.8


@pytest.mark.parametrize("top_gate", [0.5, 0.8, 0.95])
def test_the_mean_top_gate_is_what_was_asked_for(top_gate: float) -> None:
    merged = merge_experts(branches(), token_choice())
    fit_router_ridge(merged, domains(), top_gate=top_gate, normalize_rows=True)
    for x, block in zip(router_inputs(merged, torch.cat(domains())), merged.blocks, strict=True):
        weight = block.feed_forward.router.weight.detach()
        gates = (x @ weight.T).softmax(dim=-1)
        assert float(gates.amax(dim=-1).mean()) == pytest.approx(top_gate, abs=1e-3)
        norms = weight.norm(dim=-1)
        torch.testing.assert_close(norms, norms.mean().expand(3))


def test_routers_are_as_sure_as_they_are_right() -> None:
    merged = merge_experts(branches(), token_choice())  # too narrow to be right everywhere
    agreement = fit_router_ridge(merged, domains())
    for x, block in zip(router_inputs(merged, torch.cat(domains())), merged.blocks, strict=True):
        gates = block.feed_forward.router(x).detach().softmax(dim=-1).amax(dim=-1)
        right = agreement.pop(next(iter(agreement)))
        assert 0.5 < right < 0.95
        assert float(gates.mean()) == pytest.approx(right, abs=1e-3)


def test_layers_are_fitted_on_what_they_read_once_earlier_ones_route() -> None:
    merged = merge_experts(branches(distance=0.3), SparseConfig(n_experts=3))
    fit_router_ridge(merged, domains())
    x = router_inputs(merged, torch.cat(domains()))[1]
    expert = torch.arange(3).repeat_interleave(domains()[0].numel())
    expected = F.normalize(ridge_solution(x, expert, 3, 0.01).T.float(), dim=-1)
    got = F.normalize(merged.blocks[1].feed_forward.router.weight, dim=-1)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("capacity_factor", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_calibrated_thresholds_give_each_expert_its_capacity(
    capacity_factor: float, gate: str
) -> None:
    sparse = SparseConfig(n_experts=3, capacity_factor=capacity_factor, gate=gate)
    merged, samples = merge_experts(branches(), sparse), [text_of(20, 24), text_of(12, 24, seed=1)]
    randomize_routers(merged)
    tokens = torch.cat(samples)
    with torch.no_grad():
        before = [routing_summary(r.statistics) for r in merged.read(tokens).routed]
        assert all(s["experts_per_token"] == 3 for s in before)
        merged.calibrate_thresholds(tokens)
        capacity = int(capacity_factor * tokens.numel() / 3)
        for routed in merged.read(tokens).routed:
            load = routed.statistics.expert_load
            assert ((load - capacity).abs() <= 2).all(), load  # the k-th itself does not pass


def test_calibrating_twice_is_calibrating_once() -> None:
    merged = merge_experts(branches(), SparseConfig(n_experts=3))
    randomize_routers(merged)
    merged.calibrate_thresholds(text_of(8, 24, seed=3))
    merged.calibrate_thresholds(text_of(8, 24))
    once = [block.feed_forward.state.threshold for block in merged.blocks]
    merged.calibrate_thresholds(text_of(8, 24))
    for block, threshold in zip(merged.blocks, once, strict=True):
        assert torch.equal(block.feed_forward.state.threshold, threshold)


def test_token_choice_has_nothing_to_calibrate() -> None:
    merged = merge_experts(branches())
    before = {n: t.clone() for n, t in merged.state_dict().items()}
    merged.calibrate_thresholds(text_of(4, 24))
    assert all(torch.equal(t, before[n]) for n, t in merged.state_dict().items())


def test_fitting_leaves_the_mode_and_no_hooks_behind() -> None:
    merged = merge_experts(branches()).train()
    fit_router_ridge(merged, domains())
    assert merged.training
    assert not any(m._forward_pre_hooks for m in merged.modules())


def test_a_random_router_is_the_same_for_the_same_seed() -> None:
    first, again, other = (merge_experts(branches()) for _ in range(3))
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        init_router_random(model, seed)
    weights = [m.blocks[0].feed_forward.router.weight for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert float(weights[0].detach().std()) == pytest.approx(0.02, rel=0.4)


def test_samples_that_do_not_fit_are_refused() -> None:
    merged = merge_experts(branches())
    with pytest.raises(DataError, match="3 experts need as many samples"):
        fit_router_ridge(merged, domains(2))
    with pytest.raises(DataError, match="one length"):
        fit_router_ridge(merged, [*domains()[:2], text_of(3, 9)])


@pytest.mark.parametrize("wrong", [{"ridge": 0.0}, {"top_gate": 0.2}, {"top_gate": 1.0}])
def test_arguments_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        fit_router_ridge(merge_experts(branches()), domains(), **wrong)


def test_a_dense_model_has_no_routers() -> None:
    with pytest.raises(ConfigError, match="no routers"):
        init_router_random(small_expert(), 0)
