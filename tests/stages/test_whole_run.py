"""A miniature run from data to numbers, stopped, changed, damaged and continued."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pyper.checkpoint import load_checkpoint
from pyper.errors import CheckpointError, ConfigError, DataError, InterruptedRun, TokenizerError
from pyper.mixture.store import read_settings
from pyper.stages import jobs, tiny_lm
from pyper.stages.assign import assign
from pyper.stages.assignment import assignment_summary
from pyper.stages.context import Context
from pyper.stages.inspect import inspect_path
from pyper.stages.pipeline import run_pipeline, train_only
from pyper.stages.train import _data_seed, parse_unit, units_of
from pyper.train.state import optimizer_state_of

pytestmark = pytest.mark.usefixtures("one_thread")

Open = Callable[..., Context]
PARTS = ("seed", "control", "experts/00", "experts/01")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "best").model


def assert_same_weights(ours: Path, theirs: Path) -> None:
    one, two = weights_of(ours), weights_of(theirs)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.unlink()  # a mixture may share the file
    file.write_bytes(content)


def times_of(folder: Path, *below: str) -> dict[str, int]:
    files = [f for part in below for f in sorted((folder / part).rglob("*")) if f.is_file()]
    return {str(f): f.stat().st_mtime_ns for f in files if f.name != ".lock"}


def said(context: Context) -> str:
    return context.console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


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


@pytest.mark.parametrize("text", ["expert:2", "expert:law", "expert", "sead", "seed:1", ""])
def test_an_unknown_part_lists_the_known_ones(text: str) -> None:
    with pytest.raises(ConfigError, match="names no part") as caught:
        parse_unit(text, ["sums", "tales"])
    assert "sums, tales" in caught.value.hint


@pytest.mark.parametrize(
    "setting",
    [
        "train.learning_rate=1e-4",
        "model.d_ff=64",
        "data.seq_len=32",
        "run.random_seed=1",
        "mixture.n_experts=2.0",
    ],
)
def test_other_training_settings_on_the_same_folder_are_refused(
    open_new: Open, copied_run: str, setting: str
) -> None:
    key = setting.partition("=")[0]
    if key == "mixture.n_experts":  # the same number is no change
        open_new(copied_run, setting)
        return
    with pytest.raises(ConfigError, match=f"`{key}` was") as caught:
        open_new(copied_run, setting)
    assert "run.folder" in caught.value.hint


def test_how_experts_are_mixed_may_change(open_new: Open, copied_run: str, tmp_path: Path) -> None:
    before = times_of(tmp_path / copied_run, "experts", "seed", "control")

    settings = ("mixture.mixing=top1", "mixture.temperature=0.5", "evaluate.tokens=64")
    report = run_pipeline(open_new(copied_run, *settings))

    assert times_of(tmp_path / copied_run, "experts", "seed", "control") == before
    mixture = read_settings(tmp_path / copied_run / "mixture")
    assert (mixture.mixing, mixture.temperature) == ("top1", 0.5)
    assert report["temperature"] == 0.5
    assert report["tokens"] == 2 * 64


@pytest.mark.parametrize("router", ["lm", "experts"])
def test_other_routers_work(
    open_new: Open, copied_run: str, tmp_path: Path, router: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_lm, "_STEPS", 3)
    report = run_pipeline(open_new(copied_run, f"mixture.router={router}"))
    assert read_settings(tmp_path / copied_run / "mixture").router == router
    assert sum(report["load"]) == pytest.approx(1, abs=1e-3)


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


def test_folders_give_an_expert_per_domain(finished_run: Path) -> None:
    summary = assignment_summary(finished_run / "assignment")
    assert summary["experts"] == ["sums", "tales"]
    assert summary["prices"] is None
    assert summary["domains"]["sums"]["tales"] == summary["domains"]["tales"]["sums"] == 0


def test_discovery_finds_the_two_domains_by_itself(open_new: Open, tmp_path: Path) -> None:
    context = open_new("found", "mixture.assign=discover")
    assigned = assign(context)

    table = assignment_summary(tmp_path / "found" / "assignment")["domains"]
    shares = [max(row.values()) / sum(row.values()) for row in table.values()]
    assert min(shares) > 0.6
    assert sorted(assigned.names) == ["sums", "tales"]
    assert assigned.prices is not None
    loads = assigned.train_tokens(context)
    assert max(loads) / sum(loads) < 0.6


def test_as_many_folders_as_experts_are_needed(open_new: Open) -> None:
    with pytest.raises(ConfigError, match="gives 2 experts, one per domain") as caught:
        open_new("three", "mixture.n_experts=3")
    assert "n_experts = 2" in caught.value.hint


def test_an_expert_with_hardly_any_text_is_refused(open_new: Open) -> None:
    long = ("data.seq_len=65536", "train.global_batch_tokens=65536")
    with pytest.raises(DataError, match="less than one sequence") as caught:
        assign(open_new("starving", *long))
    assert "n_experts" in caught.value.hint


def test_a_vocabulary_that_is_not_the_data_s_is_refused(open_new: Open) -> None:
    with pytest.raises(TokenizerError, match=r"`model.vocab_size` is 999.*has 257"):
        open_new("vocabulary", "model.vocab_size=999")


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


def test_a_run_of_bf16_weights_with_random_shards_and_without_seed(
    open_new: Open, tmp_path: Path
) -> None:
    settings = ("train.precision=bf16", "train.seed_fraction=0", "train.random_shards=true")
    report = run_pipeline(open_new("other", *settings))
    assert not (tmp_path / "other" / "seed").exists()
    assert report["random_shards"] is not None
    assert report["steps"] == {"control": 8, "expert:0": 4, "expert:1": 4}
    weights = weights_of(tmp_path / "other" / "experts" / "00")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_an_expert_may_differ_in_settings_and_budget(open_new: Open, tmp_path: Path) -> None:
    context = open_new("own", expert=[{"name": "tales", "steps": 3, "optimizer": "muon"}])

    results = train_only(context, ["seed", "expert:sums", "expert:tales"])

    assert [(r["name"], r["steps"]) for r in results] == [("seed", 4), ("sums", 2), ("tales", 3)]
    experts = tmp_path / "own" / "experts"
    has_muon = [
        any("momentum" in key for key in load_checkpoint(experts / e / "best").optimizer)
        for e in ("00", "01")
    ]
    assert has_muon == [False, True]
    with pytest.raises(ConfigError, match="`expert` was"):
        open_new("own")


@pytest.mark.parametrize(
    ("own", "said"),
    [({"name": "law"}, "law"), ({"index": 2}, "2"), ({"index": 9, "name": "x"}, "x")],
)
def test_settings_for_no_expert_of_the_run_are_refused(
    open_new: Open, own: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=rf"`\[\[expert\]\]` {said} is none of") as caught:
        assign(open_new("run", expert=[own | {"beta1": 0.5}]))
    assert "0 sums, 1 tales" in caught.value.hint
    # What was divided meanwhile does not hold anybody to the mistake.
    renamed = {"index": 1, "name": "stories", "beta1": 0.5}
    assert assign(open_new("run", expert=[renamed])).names == ["sums", "stories"]


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


def test_a_run_in_fp8_learns_as_one_in_bf16(open_new: Open, tmp_path: Path) -> None:
    final = {}
    for precision in ("bf16", "fp8"):
        model = ["model.d_model=32", "model.d_ff=64", "train.steps=60", "train.eval_every=60"]
        context = open_new(precision, f"train.precision={precision}", *model)
        (result,) = train_only(context, ["seed"])
        final[precision] = result["loss"]
    assert final["fp8"] != final["bf16"]
    assert final["fp8"] == pytest.approx(final["bf16"], rel=0.01)
