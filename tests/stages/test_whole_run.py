"""A miniature run from data to numbers, in parts, in jobs, damaged and continued."""

import json
import math
from pathlib import Path

import pytest
import torch
from run_files import Open, assert_same_weights, flip_a_bit, said, times_of

from pyper.checkpoint import load_checkpoint
from pyper.errors import CheckpointError, InterruptedRun
from pyper.stages import jobs
from pyper.stages.assign import assign
from pyper.stages.inspect import inspect_path
from pyper.stages.pipeline import run_pipeline, train_only
from pyper.stages.train import _data_seed, units_of
from pyper.train.state import optimizer_state_of

pytestmark = pytest.mark.usefixtures("one_thread")

PARTS = ("seed", "control", "experts/00", "experts/01")


def test_evaluation_holds_every_number_of_the_schema(finished_run: Path) -> None:
    report = json.loads((finished_run / "evaluation.json").read_text())

    assert report["expert_names"] == ["sums", "tales"]
    assert report["routed"].keys() == {"4", "8"}
    assert report["posterior"].keys() >= {"top1", "top2", "all"}
    assert {"control", "routed_8"} <= report["bits_per_byte"].keys()
    assert report["random_shards"] is None
    assert len(report["experts"]) == len(report["load"]) == 2
    assert sum(report["load"]) == pytest.approx(1, abs=1e-3)
    assert report["oracle"] <= min(report["experts"])
    assert 0 < report["control"] < 2 * math.log(257)
    assert report["by_domain"].keys() == {"sums", "tales"}
    assert report["tokens"] == sum(d["tokens"] for d in report["by_domain"].values())
    for domain in report["by_domain"].values():
        assert {"control", "experts", "oracle", "routed", "posterior"} <= domain.keys()
    assert report["steps"] == {"seed": 4, "control": 4, "expert:0": 2, "expert:1": 2}


def test_a_second_time_nothing_is_done_again(
    finished_run: Path, open_new: Open, copied_run: str, tmp_path: Path
) -> None:
    folder = tmp_path / copied_run
    parts = ("assignment", "seed", "control", "experts", "mixture", "evaluation.json")
    before = times_of(folder, *parts) | {"": (folder / "evaluation.json").stat().st_mtime_ns}

    report = run_pipeline(open_new(copied_run))

    after = times_of(folder, *parts) | {"": (folder / "evaluation.json").stat().st_mtime_ns}
    assert after == before
    assert report == json.loads((finished_run / "evaluation.json").read_text())


def test_parts_trained_one_by_one_equal_those_of_a_whole_run(
    open_new: Open, finished_run: Path, tmp_path: Path
) -> None:
    results = train_only(open_new("parts"), ["seed"])
    assert [r["steps"] for r in results] == [4]
    assert not (tmp_path / "parts" / "experts").exists()

    results = train_only(open_new("parts"), ["expert:tales"])

    assert [(r["name"], r["steps"]) for r in results] == [("tales", 2)]
    assert not (tmp_path / "parts" / "experts" / "00").exists()
    assert not (tmp_path / "parts" / "control").exists()
    assert_same_weights(tmp_path / "parts" / "experts" / "01", finished_run / "experts" / "01")


def test_jobs_side_by_side_write_the_same_weights(
    open_new: Open, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "available_cores", lambda: 2)  # one thread for each
    run_pipeline(open_new("jobs", "run.jobs=2"))
    for part in PARTS:
        assert_same_weights(tmp_path / "jobs" / part, finished_run / part)


def test_the_error_of_a_part_is_not_hidden_by_those_that_stopped_for_it() -> None:
    def outcome(future: "jobs.Future[jobs._Outcome]", **facts: object) -> None:
        future.set_result(jobs._Outcome(None, **facts))  # type: ignore[arg-type]

    stopped: jobs.Future[jobs._Outcome] = jobs.Future()
    failed: jobs.Future[jobs._Outcome] = jobs.Future()
    outcome(stopped, message="stopped", exit_code=143)
    outcome(failed, message="the loss is nan", exit_code=1)
    assert sorted([stopped, failed], key=jobs._was_interrupted) == [failed, stopped]
    with pytest.raises(InterruptedRun, match="stopped"):
        jobs._result_of(stopped)


def test_an_expert_before_its_seed_is_refused(open_new: Open) -> None:
    with pytest.raises(CheckpointError, match="the seed is not trained to its end") as caught:
        train_only(open_new("early"), ["expert:0"])
    assert "--only seed" in caught.value.hint


def test_mixing_before_all_experts_are_trained_names_the_missing_one(open_new: Open) -> None:
    from pyper.stages.mix import mix

    context = open_new("half")
    train_only(context, ["seed", "expert:0"])
    with pytest.raises(CheckpointError, match="expert 1 \\(`tales`\\) is not trained") as caught:
        mix(context, assign(context))
    assert "--only expert:1" in caught.value.hint


def test_a_damaged_newest_checkpoint_falls_back_and_says_so(
    open_new: Open, finished_run: Path, copied_run: str, tmp_path: Path
) -> None:
    expert = tmp_path / copied_run / "experts" / "01"
    newest = max((expert / "checkpoints").iterdir())
    flip_a_bit(newest / "model.safetensors")

    context = open_new(copied_run)
    report = run_pipeline(context)

    assert "using an earlier checkpoint" in said(context)
    assert_same_weights(expert, finished_run / "experts" / "01")
    before = json.loads((finished_run / "evaluation.json").read_text())
    assert report["experts"] == before["experts"]


def test_inspect_finds_one_flipped_bit(copied_run: str, tmp_path: Path) -> None:
    folder = tmp_path / copied_run
    facts = inspect_path(folder)
    assert (facts["kind"], facts["damaged"], facts["n_experts"]) == ("run", [], 2)
    assert facts["trained"] == ["control", "experts/00", "experts/01", "seed"]

    flip_a_bit(folder / "experts" / "00" / "best" / "optimizer.safetensors")

    (message,) = inspect_path(folder)["damaged"]
    assert "experts/00" in message
    assert "optimizer.safetensors" in message
    assert inspect_path(folder / "mixture")["damaged"] == []


@pytest.mark.parametrize("part", ["expert:0", "control"])
def test_experts_and_control_begin_at_the_weights_and_moments_of_the_seed(
    open_new: Open, tmp_path: Path, part: str
) -> None:
    """At a rate of almost nothing they stay there."""
    train_only(open_new("branch", "train.branch_learning_rate_scale=1e-9"), ["seed", part])

    folder = tmp_path / "branch" / ("control" if part == "control" else "experts/00")
    seed, branch = (load_checkpoint(f / "best") for f in (tmp_path / "branch" / "seed", folder))
    for name, weight in seed.model.items():
        torch.testing.assert_close(branch.model[name], weight, rtol=0, atol=1e-7)
    (adamw,) = optimizer_state_of(branch)["optimizers"]
    steps = {int(own["step"]) for own in adamw.values()}
    assert steps == {4 + (4 if part == "control" else 2)}


def test_no_two_parts_read_in_the_same_order(open_new: Open) -> None:
    context = open_new("orders", "train.random_shards=true")
    first, rest = units_of(context)
    assert len({_data_seed(context, unit) for unit in [*first, *rest]}) == len(first) + len(rest)
