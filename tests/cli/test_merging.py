"""`pyper merge`: a run's experts as one model that writes, is inspected and is tuned."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cli.conftest import Ended
from pyper.mixture import load_mixture
from pyper.nn import Transformer

Pyper = Callable[..., Ended]


def merged(pyper: Pyper, run: Path, output: Path, *options: str) -> dict[str, object]:
    ended = pyper("merge", run, "-o", output, *options, "--json")
    assert ended.exit_code == 0, ended.stderr
    result: dict[str, object] = json.loads(ended.stdout)
    return result


def model_of(folder: Path) -> Transformer:
    mixture, _ = load_mixture(folder)
    assert mixture.n_experts == 1
    return mixture.expert(0)


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run", symlinks=True))


@pytest.mark.parametrize("routing", ["token_choice", "expert_choice", "threshold", "capped"])
def test_experts_become_one_sparse_model_that_writes(
    pyper: Pyper, run: Path, tmp_path: Path, routing: str
) -> None:
    result = merged(pyper, run, tmp_path / "merged", "--routing", routing)

    assert {"average", "best_expert_by_domain", "seed", "control"} == set(result["before"])  # type: ignore[call-overload]
    assert set(result["router_accuracy"]) == {"blocks.0.feed_forward"}  # type: ignore[call-overload]
    model = model_of(tmp_path / "merged")
    assert (model.config.kind, model.config.routing.routing) == ("sparse", routing)
    assert model.config.routing.n_experts == 2
    wrote = pyper("generate", tmp_path / "merged", "-p", "1 + ", "-n", 5, "--json")
    assert json.loads(wrote.stdout)["experts"] == ["merged"]
    facts = json.loads(pyper("inspect", tmp_path / "merged", "--json").stdout)
    assert (facts["kind"], facts["damaged"]) == ("mixture", [])
    assert not list(tmp_path.glob(".merged*"))


def test_each_experts_feed_forward_is_kept_and_the_rest_is_averaged(
    pyper: Pyper, run: Path, tmp_path: Path
) -> None:
    merged(pyper, run, tmp_path / "merged", "--attention", "average")
    mixture, _ = load_mixture(run)
    experts = [mixture.expert(e).state_dict() for e in range(2)]
    weights = model_of(tmp_path / "merged").state_dict()
    name = "blocks.0.feed_forward.up.weight"
    assert torch.equal(weights[name], torch.stack([e[name] for e in experts]))
    name = "blocks.0.attention.qkv.weight"
    torch.testing.assert_close(weights[name], torch.stack([e[name] for e in experts]).mean(0))


def test_averaging_upcycling_and_soft_attention(pyper: Pyper, run: Path, tmp_path: Path) -> None:
    result = merged(pyper, run, tmp_path / "mean", "--average")
    assert result["loss"] == pytest.approx(result["before"]["average"])  # type: ignore[index]
    assert model_of(tmp_path / "mean").config.kind == "dense"
    merged(pyper, run, tmp_path / "copies", "--upcycle", "4", "--noise", "0.01")
    assert model_of(tmp_path / "copies").config.routing.n_experts == 4
    merged(pyper, run, tmp_path / "soft", "--attention", "soft")
    assert model_of(tmp_path / "soft").config.attention_experts == 2


def test_one_more_expert_joins_a_merged_model(pyper: Pyper, run: Path, tmp_path: Path) -> None:
    merged(pyper, run, tmp_path / "merged")
    result = merged(pyper, tmp_path / "merged", tmp_path / "grown", "--add", f"{run}:sums")
    assert result["n_experts"] == 3
    assert 0.3 < result["cosine"] <= 1  # type: ignore[operator]
    before, after = (model_of(tmp_path / n).state_dict() for n in ("merged", "grown"))
    name = "blocks.0.feed_forward.down.weight"
    assert torch.equal(after[name][:2], before[name])


def test_a_merged_model_is_tuned_by_a_run_of_its_own(
    pyper: Pyper, run: Path, tmp_path: Path, data_folder: Path
) -> None:
    merged(pyper, run, tmp_path / "merged")
    file = tmp_path / "tune.toml"
    file.write_text(
        f"[data]\npath = '{data_folder}'\nseq_len = 16\n[train]\nsteps = 4\n"
        f"start_from = '{tmp_path / 'merged'}'\nfreeze = ['feed_forward']\n"
        "global_batch_tokens = 64\neval_tokens = 32\nprecision = 'fp32'\nlearning_rate = 0.01\n"
        f"[evaluate]\ntokens = 64\n[run]\nfolder = '{tmp_path / 'tuned'}'\n"
    )
    ended = pyper("train", file, "--json")
    assert ended.exit_code == 0, ended.stderr
    assert json.loads(ended.stdout)["routing"][0]["causal"] > 0
    before, after = (model_of(tmp_path / n).state_dict() for n in ("merged", "tuned"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "blocks.0.attention.qkv.weight" in changed
    assert "blocks.0.feed_forward.router.weight" in changed
    assert not any("feed_forward.up" in name or "feed_forward.down" in name for name in changed)


def test_what_cannot_be_merged_is_refused_in_two_lines(
    pyper: Pyper, run: Path, tmp_path: Path
) -> None:
    for options, word in (
        (("--router", "rigde"), "rigde"),
        (("--attention", "hard"), "hard"),
        (("--routing", "expert_choise"), "`--routing` does not know `expert_choise`"),
        (("--device", "gpu9"), "gpu9"),
        (("--add", "nothing"), "RUN:EXPERT"),
    ):
        ended = pyper("merge", run, "-o", tmp_path / "out", *options)
        assert ended.exit_code == 1
        error, hint = ended.complaint
        assert word in error
        assert hint.startswith("hint:")
    for wrong in (("--upcycle", 0), ("--upcycle", 1), ("--top-k", 0)):
        assert pyper("merge", run, "-o", tmp_path / "out", *wrong).exit_code == 2
    ended = pyper("merge", run, "-o", run / "merged")
    assert "belongs to the run" in ended.complaint[0]
    assert not (tmp_path / "out").exists()


def test_a_merged_model_may_lie_beside_a_run_file(pyper: Pyper, run: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[data]\npath = 'elsewhere'\n")
    merged(pyper, run, tmp_path / "merged")


def test_merging_elsewhere_leaves_the_settings_of_the_run_alone(
    pyper: Pyper, run: Path, finished_run: Path, tmp_path: Path
) -> None:
    """A run of a machine with a GPU is merged on one without."""
    file = run / "run.toml"
    text = file.read_text().replace(str(finished_run), str(run))
    assert text.count('device = "cpu"') == 1
    file.write_text(text.replace('device = "cpu"', 'device = "gpu9"'))
    merged(pyper, run, tmp_path / "merged", "--device", "cpu")
    assert 'device = "gpu9"' in file.read_text()


def test_a_stranger_is_not_added_to_a_merged_model(
    pyper: Pyper, run: Path, run_file: Path, tmp_path: Path
) -> None:
    merged(pyper, run, tmp_path / "merged")
    other = ("--set", f"run.folder={tmp_path / 'other'}", "--set", "run.random_seed=7")
    assert pyper("train", run_file, *other).exit_code == 0
    ended = pyper(
        "merge", tmp_path / "merged", "-o", tmp_path / "out", "--add", f"{tmp_path}/other:sums"
    )
    assert ended.exit_code == 1
    error, hint = ended.complaint
    assert "no common seed" in error
    assert "cosine" in error
    assert "pyper mix" in hint
    assert not (tmp_path / "out").exists()
