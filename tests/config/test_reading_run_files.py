"""Where a run's settings come from: files, folders, shipped names and `--set`."""

from pathlib import Path
from typing import Any

import pytest

from pyper.config import list_presets, load_run, parse_run, preset_path, read_toml
from pyper.config.load import apply_override
from pyper.errors import ConfigError
from pyper.stages.toml import to_toml


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


class TestSet:
    """`--set`."""

    @pytest.mark.parametrize(
        ("override", "value"),
        [
            ("train.epochs=2", 2),
            ("train.learning_rate=3e-4", 3e-4),
            ("train.learning_rate=auto", "auto"),
            ('train.learning_rate="auto"', "auto"),
            ("train.control=false", False),
            ("data.path=data/my folder", "data/my folder"),
            ("data.path=a=b", "a=b"),
            ("evaluate.prefixes=[4, 8]", [4, 8]),
            ("train.early_stopping={ patience = 3 }", {"patience": 3}),
            ("train.early_stopping.patience=3", 3),
            (" run.jobs = 2", 2),
        ],
    )
    def test_values_are_toml_or_else_text(self, override: str, value: object) -> None:
        values: dict[str, Any] = {}
        apply_override(values, override)
        keys = override.partition("=")[0].strip().split(".")
        inner: Any = values
        for key in keys:
            inner = inner[key]
        assert inner == value

    @pytest.mark.parametrize("text", ["epochs=2", "train.epochs", "=2", "train.=2", ".epochs=2"])
    def test_another_form_is_refused_with_an_example(self, text: str) -> None:
        with pytest.raises(ConfigError, match=r"not of the form section\.key=value") as caught:
            apply_override({}, text)
        assert "--set train.learning_rate=3e-4" in caught.value.hint

    def test_a_key_below_a_value_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="`epochs` is not a section"):
            apply_override({"train": {"epochs": 1}}, "train.epochs.x=1")

    def test_a_budget_replaces_the_one_in_the_file(self, tmp_path: Path) -> None:
        file = write(tmp_path / "mine.toml", "[train]\nepochs = 4\n")
        run = load_run(file, ["train.steps=10"])
        assert (run.train.steps, run.train.epochs) == (10, None)

    def test_is_checked_like_the_file(self, tmp_path: Path) -> None:
        file = write(tmp_path / "mine.toml", "")
        with pytest.raises(ConfigError, match=r"unknown key `train.epoch`") as caught:
            load_run(file, ["train.epoch=10", "train.steps=1"])
        assert caught.value.hint == "did you mean `epochs`?"


class TestFiles:
    """Reading run files."""

    @pytest.mark.parametrize("name", list_presets())
    def test_every_shipped_run_file_loads(self, name: str) -> None:
        run = load_run(name)
        assert run == load_run(preset_path(name))
        assert run.run.folder is not None

    def test_the_folder_is_named_after_the_file(self, tmp_path: Path) -> None:
        file = write(tmp_path / "mine.toml", "")
        assert load_run(file).run.folder == Path("runs/mine")
        assert load_run(file, ["run.folder=elsewhere"]).run.folder == Path("elsewhere")

    def test_bad_toml_names_file_and_line(self, tmp_path: Path) -> None:
        file = write(tmp_path / "bad.toml", "[train]\nepochs = 1\nschedule = wsd\n")
        with pytest.raises(ConfigError, match=r"bad\.toml is not valid TOML.*line 3") as caught:
            load_run(file)
        assert 'schedule = "wsd"' in caught.value.hint

    def test_a_file_that_is_not_utf8_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "latin.toml").write_bytes(b"[run]\nfolder = '\xe9'\n")
        with pytest.raises(ConfigError, match="is not UTF-8"):
            load_run(tmp_path / "latin.toml")

    def test_a_byte_order_mark_does_no_harm(self, tmp_path: Path) -> None:
        (tmp_path / "bom.toml").write_bytes(b"\xef\xbb\xbf[train]\nsteps = 3\n")
        assert load_run(tmp_path / "bom.toml").train.steps == 3

    def test_a_missing_file_names_the_nearest(self, tmp_path: Path) -> None:
        write(tmp_path / "tales.toml", "")
        with pytest.raises(ConfigError, match="no run file") as caught:
            load_run(tmp_path / "tale.toml")
        assert "tales.toml" in caught.value.hint

    def test_a_mistyped_preset_names_the_nearest(self) -> None:
        with pytest.raises(ConfigError) as caught:
            load_run("smal")
        assert caught.value.hint == "did you mean `small`?"

    def test_a_run_folder_stands_for_its_run_file(self, tmp_path: Path) -> None:
        write(tmp_path / "run.toml", "[train]\nsteps = 3\n")
        assert load_run(tmp_path).train.steps == 3

    def test_a_run_folder_is_where_it_lies_and_not_where_it_was_begun(self, tmp_path: Path) -> None:
        file = write(tmp_path / "run.toml", '[run]\nfolder = "runs/old"\n')
        assert load_run(tmp_path).run.folder == Path("runs/old")  # a run file of the user's own
        write(tmp_path / "run.json", "{}")
        assert load_run(tmp_path).run.folder == load_run(file).run.folder == tmp_path
        assert load_run(tmp_path, ["run.folder=new"]).run.folder == Path("new")


@pytest.mark.parametrize("name", [*list_presets(), "all"])
def test_a_resolved_run_file_reads_back_as_the_same_run(name: str, tmp_path: Path) -> None:
    values = {
        "run": {"folder": 'odd "name" \\ é'},
        "data": {"seq_len": 64},
        "model": {"rope_scaling": {"kind": "ntk", "factor": 2.5}},
        "train": {"tokens": "2M", "early_stopping": {"patience": 3}},
        "expert": [
            {"name": "law", "learning_rate": 1e-5, "early_stopping": {"patience": 2}},
            {"index": 3, "steps": 7},
        ],
    }
    run = parse_run(values) if name == "all" else load_run(name)
    text = to_toml(run.model_dump(mode="json", exclude_none=True))
    assert parse_run(read_toml(write(tmp_path / "run.toml", text))) == run
