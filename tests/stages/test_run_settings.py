"""Settings of a miniature run: what may change on a folder, what is refused, what they make."""

from pathlib import Path
from typing import Any

import pytest
import torch
from run_files import Open, times_of, weights_of

from pyper.checkpoint import load_checkpoint
from pyper.errors import ConfigError, DataError, TokenizerError
from pyper.mixture.store import read_settings
from pyper.stages import tiny_lm
from pyper.stages.assign import assign
from pyper.stages.assignment import assignment_summary
from pyper.stages.pipeline import run_pipeline, train_only
from pyper.stages.train import parse_unit

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_a_run_in_fp8_learns_as_one_in_bf16(open_new: Open, tmp_path: Path) -> None:
    final = {}
    for precision in ("bf16", "fp8"):
        model = ["model.d_model=32", "model.d_ff=64", "train.steps=60", "train.eval_every=60"]
        context = open_new(precision, f"train.precision={precision}", *model)
        (result,) = train_only(context, ["seed"])
        final[precision] = result["loss"]
    assert final["fp8"] != final["bf16"]
    assert final["fp8"] == pytest.approx(final["bf16"], rel=0.01)
