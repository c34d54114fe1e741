"""Learning-rate schedules at their corners."""

import pytest
from tiny_training import new_config

from pyper.train import Schedule, branch_schedule, seed_schedule


def factors(shape: str, *, warmup: int = 0, decay: float = 0.5, floor: float = 0.0) -> list[float]:
    schedule = Schedule(shape, 10 + warmup, warmup, decay, floor)
    return [schedule.factor(step) for step in range(10 + warmup)]


def test_warm_up_rises_in_equal_parts_and_is_at_the_peak_on_its_last_step() -> None:
    rising = factors("constant", warmup=4)
    assert rising[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(rising[4:]) == {1.0}


def test_linear_falls_from_the_peak_to_one_step_above_zero() -> None:
    assert factors("linear") == pytest.approx([1 - n / 10 for n in range(10)])


def test_cosine_is_at_half_height_half_way() -> None:
    falling = factors("cosine")
    assert falling[0] == 1.0
    assert falling[5] == pytest.approx(0.5)
    assert falling == sorted(falling, reverse=True)
    assert 0 < falling[-1] < 0.03


def test_wsd_holds_the_peak_and_then_falls_linearly() -> None:
    assert factors("wsd", decay=0.5) == pytest.approx([1.0] * 6 + [0.8, 0.6, 0.4, 0.2])
    assert factors("wsd", decay=1.0) == pytest.approx(factors("linear"))


def test_constant_never_falls() -> None:
    assert set(factors("constant")) == {1.0}


@pytest.mark.parametrize("shape", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_every_falling_shape_ends_at_the_floor(shape: str, floor: float) -> None:
    schedule = Schedule(shape, 10, 2, 0.5, floor)
    assert schedule.factor(10) == schedule.factor(99) == pytest.approx(floor)
    assert schedule.factor(2) == 1.0


@pytest.mark.parametrize("shape", ["linear", "cosine", "wsd", "constant"])
def test_a_warm_up_as_long_as_the_run_only_rises(shape: str) -> None:
    schedule = Schedule(shape, 4, 4, 0.5, 0.0)
    assert [schedule.factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_the_seed_warms_up_and_never_falls() -> None:
    schedule = seed_schedule(new_config(warmup_steps=2), 8)
    assert [schedule.factor(step) for step in range(8)] == [0.5] + [1.0] * 7


def test_a_branch_from_the_seed_needs_no_warm_up_and_falls_to_the_smallest_rate() -> None:
    config = new_config(warmup_steps=2, learning_rate=1e-3, min_learning_rate=1e-4)
    warm = branch_schedule(config, 8, warm=True)
    cold = branch_schedule(config, 8, warm=False)
    assert warm.factor(0) == 1.0
    assert cold.factor(0) == 0.5
    assert warm.factor(8) == pytest.approx(0.1)


def test_warm_up_may_be_a_share_of_the_steps() -> None:
    assert seed_schedule(new_config(warmup_fraction=0.1), 50).warmup_steps == 5
