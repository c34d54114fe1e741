"""A routed model from data to numbers and text, beside its dense control."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sparse_runs import KINDS, STEPS, open_quietly, sparse_run

from pyper.checkpoint import load_checkpoint
from pyper.cli import main
from pyper.errors import ConfigError, InterruptedRun
from pyper.evaluate.table import results_table
from pyper.generate import SamplingConfig
from pyper.mixture import load_mixture
from pyper.mixture.store import read_settings
from pyper.stages.inspect import inspect_path
from pyper.stages.pipeline import run_pipeline, train_only
from pyper.stages.plan import plan
from pyper.stages.train import units_of
from pyper.stages.write import open_model, write_json

pytestmark = pytest.mark.usefixtures("one_thread")


Finished = Callable[[str], Path]


def report_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "evaluation.json").read_text()))


def config_of(folder: Path) -> dict[str, Any]:
    return dict(load_checkpoint(folder / "best").state["model_config"])


@pytest.mark.parametrize("name", KINDS)
def test_the_control_is_dense_and_of_the_same_shape_and_length(
    finished_sparse: Finished, name: str
) -> None:
    folder = finished_sparse(name)
    control, expert = config_of(folder / "control"), config_of(folder / "experts" / "00")
    assert (control["kind"], control["sparse"]) == ("dense", None)
    assert expert["kind"] == ("token_mixture" if name == "token_mixture" else "sparse")
    assert expert["sparse"]["n_experts"] == 3
    same = control.keys() - {"kind", "sparse"}
    assert {key: control[key] for key in same} == {key: expert[key] for key in same}
    assert report_of(folder)["steps"] == {"control": STEPS, "expert:0": STEPS}
    assert not (folder / "seed").exists()


@pytest.mark.parametrize("name", KINDS)
def test_evaluation_holds_the_causal_loss_and_what_routing_did(
    finished_sparse: Finished, name: str
) -> None:
    report = report_of(finished_sparse(name))
    (loss,), (routing,) = report["experts"], report["routing"]
    assert routing["causal"] == pytest.approx(loss, abs=2e-5)
    assert report["oracle"] == loss
    assert report["load"] == [1.0]
    assert report["control"] != loss
    if name == "token_choice":
        assert routing["teacher_forced"] is routing["leak_gap"] is None
    else:
        gap = routing["teacher_forced"] - routing["causal"]
        assert routing["leak_gap"] == pytest.approx(gap, abs=2e-5)
        assert routing["teacher_forced"] != routing["causal"]
    for layer in routing["layers"]:  # loads of single passes are less even than their sum
        assert 0 < layer["max_violation"] <= layer["max_violation_batch"] + 0.02
    assert routing["max_violation"] == max(x["max_violation"] for x in routing["layers"])
    assert len(routing["layers"]) == (1 if name == "token_mixture" else 2)
    for layer in routing["layers"]:
        assert len(layer["load"]) == 3
        assert len(layer["fan_out"]) == 4
        assert sum(layer["fan_out"]) == pytest.approx(1)
        assert layer["experts_per_token"] == pytest.approx(sum(layer["load"]), rel=1e-5)
        assert layer["zero_expert_share"] == pytest.approx(layer["fan_out"][0])
        assert (layer["flip_rate"] > 0) is (name != "token_choice")
        assert (layer["threshold_gap"] > 0) is (name != "token_choice")
    mean = sum(layer["flip_rate"] for layer in routing["layers"]) / len(routing["layers"])
    assert routing["flip_rate"] == pytest.approx(mean)


@pytest.mark.parametrize("name", KINDS)
def test_the_numbers_are_those_of_the_saved_model(finished_sparse: Finished, name: str) -> None:
    """Thresholds went through the checkpoint, the mixture and back."""
    folder = finished_sparse(name)
    saved = load_checkpoint(folder / "experts" / "00" / "best").model
    mixture, _ = load_mixture(folder)
    model = mixture.expert(0)
    assert not model.training
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved[key]), key
    updates = [int(t) for key, t in saved.items() if key.endswith("threshold_updates")]
    assert set(updates) == {0 if name == "token_choice" else STEPS}


def table_of(report: dict[str, Any]) -> list[list[str]]:
    table = results_table(report)
    return [
        list(row) for row in zip(*(list(column.cells) for column in table.columns), strict=True)
    ]


@pytest.mark.parametrize("name", KINDS)
def test_the_table_never_headlines_what_saw_the_future(
    finished_sparse: Finished, name: str
) -> None:
    report = report_of(finished_sparse(name))
    for forced in (0.5, 9.0):  # better or worse than the causal loss
        if name != "token_choice":
            report["routing"][0]["teacher_forced"] = forced
        table = results_table(report)
        rows = list(zip(table_of(report), (str(row.style) for row in table.rows), strict=True))
        by_name = {cells[0]: (cells, style) for cells, style in rows}
        assert list(by_name)[:2] == ["dense control", report["expert_names"][0]]
        cells, style = by_name[report["expert_names"][0]]
        assert cells[1] == f"{report['routing'][0]['causal']:.3f}"
        assert style == "green"
        seers = [row for row in rows if f"{forced:.3f}" in row[0]]
        assert len(seers) == (0 if name == "token_choice" else 1)
        assert all("sees the future" in cells[0] and style == "dim" for cells, style in seers)


@pytest.mark.parametrize("name", KINDS)
def test_decoding_writes_what_reading_the_whole_would(finished_sparse: Finished, name: str) -> None:
    folder = finished_sparse(name)
    model = open_model(folder, expert=None, mixing=None, resident=None, device="cpu")
    prompts = ["the fox", "1"]
    written = write_json(model, prompts, SamplingConfig(max_new_tokens=6, temperature=0))
    expert, tokenizer = model.mixture.expert(0), model.tokenizer
    for prompt, completion in zip(prompts, written["completions"], strict=True):
        tokens = [expert.config.bos_id, *tokenizer.encode(prompt)]
        for _ in range(6):
            tokens.append(int(expert(torch.tensor([tokens]))[0, -1].argmax()))
        text = tokenizer.decode(tokens[1:])
        assert text.startswith(prompt + completion["text"])
        assert completion["tokens"]


def test_pyper_generate_writes_from_it(
    finished_sparse: Finished,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = finished_sparse("sparse")
    monkeypatch.setattr(sys, "argv", ["pyper", "generate", str(folder), "-p", "the", "-n", "4"])
    with pytest.raises(SystemExit) as ended:
        main.run()
    assert not ended.value.code
    assert capsys.readouterr().out.startswith("the")


@pytest.mark.parametrize("name", ["sparse", "token_mixture"])
def test_a_stopped_run_goes_on_to_the_same_weights(
    finished_sparse: Finished,
    name: str,
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pyper.train import loop

    run = sparse_run(name, tmp_path / "cut", data_folder)
    original = loop._Trainer._learn
    calls = 0

    def interrupt(self: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise InterruptedRun("stopped", hint="go on", exit_code=130)
        return original(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(loop._Trainer, "_learn", interrupt)
        with pytest.raises(InterruptedRun):
            train_only(open_quietly(run), ["expert:0"])
    assert (tmp_path / "cut" / "experts" / "00" / "checkpoints" / "step-0000002").is_dir()

    report = run_pipeline(open_quietly(run))

    ours, theirs = (
        load_checkpoint(folder / "experts" / "00" / "best").model
        for folder in (tmp_path / "cut", finished_sparse(name))
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert report["routing"] == report_of(finished_sparse(name))["routing"]


def test_a_second_time_nothing_is_done_again(finished_sparse: Finished, data_folder: Path) -> None:
    folder = finished_sparse("sparse")
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.name != ".lock"]
    before = {f: f.stat().st_mtime_ns for f in files if f.name not in ("run.toml", "run.json")}
    assert run_pipeline(open_quietly(sparse_run("sparse", folder, data_folder))) == report_of(
        folder
    )
    assert {f: f.stat().st_mtime_ns for f in before} == before


def test_inspect_and_dry_run_know_it(finished_sparse: Finished, data_folder: Path) -> None:
    folder = finished_sparse("sparse")
    facts = inspect_path(folder)
    assert facts["damaged"] == []
    assert facts["n_experts"] == 1
    planned = plan(sparse_run("sparse", folder, data_folder))
    assert planned["steps"] == {"seed": 0, "experts": STEPS, "control": STEPS}
    assert planned["needs"]["parameters_per_expert"] == facts["expert"]["parameters"]
    assert read_settings(folder / "mixture").router == "experts"


def test_defaults_of_a_routed_model_are_filled_in(data_folder: Path, tmp_path: Path) -> None:
    run = sparse_run("sparse", tmp_path, data_folder)
    assert (run.mixture.n_experts, run.mixture.top_k, run.mixture.router) == (1, 1, "experts")
    assert (run.train.seed_fraction, run.train.control) == (0.0, True)
    first, rest = units_of(open_quietly(run))
    assert (first, [str(unit) for unit in rest]) == ([], ["control", "expert:0"])
    dense = sparse_run("sparse", tmp_path, data_folder, model={"kind": "dense", "sparse": None})
    assert (dense.mixture.n_experts, dense.train.seed_fraction) == (8, 0.5)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"seed_fraction": 0.5}}, "cannot branch from a sparse seed"),
        ({"model": {"kind": "dense"}}, r"`\[model.sparse\]` has no effect"),
        ({"model": {"sparse": {"n_experts": 3, "top_k": 4}}}, "model.sparse.top_k"),
        ({"model": {"sparse": {"n_experts": 3, "capacity_factor": 3.5}}}, "capacity_factor"),
        ({"model": {"kind": "token_mixture", "n_layers": 1}}, "leaves none of"),
        (
            {"model": {"kind": "token_mixture", "sparse": {"routing": "token_choice"}}},
            "its experts choose tokens",
        ),
        (
            {"model": {"sparse": {"n_experts": 4, "routing": "capped", "capacity_factor": 3.0}}},
            "lets through",
        ),
    ],
)
def test_contradictions_are_refused_with_a_way_out(
    data_folder: Path, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        sparse_run("sparse", tmp_path, data_folder, **sections)
    assert caught.value.hint
    assert "\n" not in caught.value.message
