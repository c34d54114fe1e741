"""Experts that have no common seed are refused, and told why."""

import math

import pytest
import torch
import torch.nn.functional as F

from nn.small_experts import small_config
from pyper.errors import CheckpointError, ConfigError
from pyper.merge import (
    barrier,
    barriers,
    check_common_seed,
    check_kinship,
    likeness,
    merge_experts,
)
from pyper.nn import Transformer, init_weights

STEPS = torch.tensor([1, 3, 5, 7])  # rows count on by different numbers
TOKENS = (torch.arange(40) * STEPS[:, None]) % 16 + 1


def loss(model: Transformer) -> float:
    with torch.no_grad():
        return float(_nats(model))


def _nats(model: Transformer) -> torch.Tensor:
    return F.cross_entropy(model(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten())


def trained(seed: int) -> Transformer:
    model = Transformer(small_config())
    init_weights(model, seed)
    return continued(model, steps=60, learning_rate=0.02)


def continued(start: Transformer, *, steps: int, learning_rate: float) -> Transformer:
    model = Transformer(small_config())
    model.load_state_dict(start.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        _nats(model).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def strangers() -> list[Transformer]:
    return [trained(seed) for seed in range(3)]


def test_strangers_are_refused_with_the_measured_barrier(strangers: list[Transformer]) -> None:
    found = barrier(strangers, loss)
    assert found > 1
    with pytest.raises(CheckpointError, match=f"{found:.3f} nats") as refusal:
        check_common_seed(strangers, loss, 0.1)
    assert "seed_fraction" in refusal.value.hint


def test_branches_of_one_seed_pass(strangers: list[Transformer]) -> None:
    rates = (0.001, 0.003, 0.005)
    siblings = [continued(strangers[0], steps=5, learning_rate=rate) for rate in rates]
    assert check_common_seed(siblings, loss, 0.1) == barrier(siblings, loss) < 0.1


def test_the_stranger_is_named(strangers: list[Transformer]) -> None:
    siblings = [strangers[0]] * 3
    with pytest.raises(CheckpointError, match="experts 2 and 3"):
        check_common_seed([*siblings, strangers[1]], loss, 0.1)


def test_barriers_are_losses_of_averages_above_the_mean_loss(strangers: list[Transformer]) -> None:
    values = iter([1.0, 2.0, 4.0, 5.0, 3.0])  # three experts, then two averages
    assert barriers(strangers, lambda _: next(values)) == [3.5, 0.0]


def test_a_loss_that_is_no_number_is_refused(strangers: list[Transformer]) -> None:
    with pytest.raises(CheckpointError, match="nan"):
        check_common_seed(strangers, lambda _: math.nan, 0.1)


def test_one_expert_has_no_barrier(strangers: list[Transformer]) -> None:
    with pytest.raises(ConfigError):
        barrier(strangers[:1], loss)


def test_likeness_is_the_cosine_with_the_mean_feed_forward(strangers: list[Transformer]) -> None:
    model = merge_experts(strangers[:2])
    means, own = ([], [])
    for name, weight in strangers[2].named_parameters():
        if ".feed_forward." in name:
            two = [dict(expert.named_parameters())[name] for expert in strangers[:2]]
            means.append(((two[0] + two[1]) / 2).flatten())
            own.append(weight.flatten())
    expected = F.cosine_similarity(torch.cat(means), torch.cat(own), dim=0).detach()
    assert likeness(model, strangers[2]) == pytest.approx(float(expected), rel=1e-4)


def test_a_stranger_does_not_join_a_merged_model(strangers: list[Transformer]) -> None:
    rates = (0.001, 0.003, 0.005)
    siblings = [continued(strangers[0], steps=5, learning_rate=rate) for rate in rates]
    model = merge_experts(siblings[:2])
    assert check_kinship(model, siblings[2], 0.9) == likeness(model, siblings[2])
    found = likeness(model, strangers[1])
    assert abs(found) < 0.1
    with pytest.raises(CheckpointError, match=f"{found:.3f}") as refusal:
        check_kinship(model, strangers[1], 0.2)
    assert "pyper mix" in refusal.value.hint


def test_weights_of_zero_are_like_nothing(strangers: list[Transformer]) -> None:
    nothing = Transformer(small_config())
    torch.nn.utils.vector_to_parameters(
        torch.zeros(sum(p.numel() for p in nothing.parameters())), nothing.parameters()
    )
    with pytest.raises(CheckpointError, match="nan"):
        check_kinship(merge_experts(strangers[:2]), nothing, 0.2)
