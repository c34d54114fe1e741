"""From Python: texts become data, experts, runs and merged models, quietly, as configured."""

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pyper
from pyper.checkpoint import load_checkpoint
from pyper.config import EarlyStoppingConfig, PrepareConfig, RunConfig
from pyper.data import TokenData
from small_training import SHAPE, SHORT, TEXTS

pytestmark = pytest.mark.usefixtures("one_thread")


def test_an_expert_learns_strings_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    short, longer = (
        pyper.train_expert(TEXTS, SHAPE, config, seq_len=16, tokenizer="bytes", device="cpu")
        for config in (SHORT, SHORT.model_copy(update={"steps": 80}))
    )
    losses = [m.score("11 and 11 make 22").nats_per_token for m in (short, longer)]
    assert losses[1] < losses[0] - 0.5 < math.log(257)
    other = pyper.train_expert(TEXTS, SHAPE, SHORT, seq_len=16, tokenizer="bytes", random_seed=1)
    assert other.score("11 and").nats != short.score("11 and").nats
    assert (longer.context, len(longer.experts)) == (16, 1)
    assert "make" in "".join(longer.generate(seed=s, max_new_tokens=15) for s in range(20))
    assert list(tmp_path.glob("pyper-*")) == []
    assert capfd.readouterr() == ("", "")


def test_an_expert_that_stays_goes_on_and_opens_again(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"seq_len": 16, "tokenizer": "bytes", "folder": tmp_path / "run"}
    model = pyper.train_expert(TEXTS, SHAPE, SHORT, **arguments)
    best = load_checkpoint((tmp_path / "run" / "experts" / "00" / "best").resolve())
    assert best.step == 8
    again = pyper.load(tmp_path / "run")
    assert again.score("3 and 3").nats == model.score("3 and 3").nats
    before = (tmp_path / "run" / "experts" / "00" / "metrics.jsonl").read_text()
    same = pyper.train_expert(TEXTS, SHAPE, SHORT, **arguments)
    assert same.score("3 and 3").nats == model.score("3 and 3").nats
    assert (tmp_path / "run" / "experts" / "00" / "metrics.jsonl").read_text() == before
    with pytest.raises(pyper.PyperError, match="other settings"):
        pyper.train_expert(
            TEXTS, SHAPE, SHORT.model_copy(update={"learning_rate": 1.0}), **arguments
        )


def test_training_follows_its_configuration(data_folder: Path, tmp_path: Path) -> None:
    config = SHORT.model_copy(
        update={
            "steps": 40,
            "learning_rate": 1e-9,
            "early_stopping": EarlyStoppingConfig(patience=1, min_delta=1.0),
        }
    )
    folder = tmp_path / "early"
    pyper.train_expert(data_folder, SHAPE, config, seq_len=16, folder=folder, random_seed=3)
    assert len(list((folder / "experts" / "00" / "checkpoints").iterdir())) <= 2
    lines = (folder / "experts" / "00" / "metrics.jsonl").read_text().splitlines()
    assert '"step": 12' not in lines[-1]  # stopped at the second validation
    tuned = pyper.train_expert(
        data_folder,
        pyper.ExpertConfig(),
        SHORT.model_copy(update={"start_from": folder, "learning_rate": 1e-9}),
        seq_len=16,
    )
    started = pyper.load(folder)
    assert tuned.mixture.expert(0).config.d_model == 16
    assert tuned.score("a fox").nats == pytest.approx(started.score("a fox").nats, abs=1e-3)


def test_progress_goes_to_stderr_when_asked(capfd: pytest.CaptureFixture[str]) -> None:
    pyper.train_expert(TEXTS, SHAPE, SHORT, seq_len=16, tokenizer="bytes", progress=True)
    printed, shown = capfd.readouterr()
    assert printed == ""
    assert "valid" in shown


def test_from_text_to_a_merged_model(
    texts_folder: Path,
    new_run: Callable[..., RunConfig],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    data = pyper.prepare([texts_folder], tmp_path / "data", tokenizer="bytes", valid_fraction=0.1)
    assert data == tmp_path / "data"
    run = new_run(tmp_path / "run", f"data.path={data}")
    values = run.model_dump(mode="json", exclude_none=True)

    folder = pyper.train_run(values)

    assert folder == tmp_path / "run"
    assert pyper.load(folder).experts == ("sums", "tales")
    report = pyper.evaluate_run(folder)
    assert report == pyper.evaluate_run(run)
    assert set(report["by_domain"]) == {"sums", "tales"}
    assert pyper.train_run(folder, overrides=["evaluate.tokens=64"]) == folder
    merged = pyper.merge_run(folder, tmp_path / "merged", router="means")
    assert merged["loss"] > 0
    assert pyper.load(tmp_path / "merged").mixture.expert(0).config.kind == "sparse"
    assert capfd.readouterr() == ("", "")


def test_preparing_takes_what_the_command_takes(tmp_path: Path) -> None:
    """Every setting that the command has, but the number of threads and of tokens in a shard."""
    settings = set(inspect.signature(pyper.prepare).parameters) - {"sources", "output", "progress"}
    elsewhere = {"filters": "filter"}
    assert {elsewhere.get(name, name) for name in settings} == set(PrepareConfig.model_fields) - {
        "text_key",  # `columns` says it too
        "shard_tokens",
        "workers",
    }
    rows = "".join(f"{n} {'few ' * (n % 3)}words,{'law' if n % 2 else 'sea'}\n" for n in range(60))
    (tmp_path / "table.csv").write_text("body,source\n" + rows)
    data = pyper.prepare(
        tmp_path / "table.csv",
        tmp_path / "data",
        tokenizer="bytes",
        columns={"text": "body", "domain": "source"},
        filters="words < 4",
    )
    opened = TokenData.open(data)
    assert opened.domains == ["law", "sea"]
    assert opened.manifest.counts["filter: words < 4"] == 20
