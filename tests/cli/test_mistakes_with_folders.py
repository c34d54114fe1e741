"""Folders that are taken, half done, damaged or not to be written, and commands out of turn."""

import shutil
from pathlib import Path

import pytest

from cli.conftest import Pyper, Refused
from pyper.checkpoint import folder_lock
from pyper.config import PrepareConfig
from pyper.data import prepare

pytestmark = pytest.mark.usefixtures("one_thread")


def test_nothing_but_a_mixture_is_written_over(
    refused: Refused, pyper: Pyper, finished_run: Path, data_folder: Path, tmp_path: Path
) -> None:
    drop = ("mix", finished_run, "--drop", "sums", "-o")
    error, _ = refused(*drop, data_folder)
    assert "is no mixture" in error
    error, _ = refused(*drop, finished_run / "mixture")
    assert "belongs to the run" in error
    for _ in range(2):
        assert pyper(*drop, tmp_path / "new").exit_code == 0


def test_an_expert_that_is_not_trained_cannot_be_added(
    refused: Refused, finished_run: Path, tmp_path: Path
) -> None:
    error, _ = refused("mix", finished_run, "--add", f"c={finished_run}:9", "-o", tmp_path / "new")
    assert "no trained expert 9" in error


def test_a_command_that_made_nothing_binds_nobody_to_its_settings(
    refused: Refused, pyper: Pyper, run_file: Path
) -> None:
    discover = ("assign", run_file, "--set", "mixture.assign=discover", "--set")
    error, hint = refused(*discover, "mixture.n_experts=99")
    assert "`mixture.n_experts`" in hint, error
    assert pyper(*discover, "mixture.n_experts=3").exit_code == 0


def test_an_expert_of_another_tokenizer(
    refused: Refused,
    pyper: Pyper,
    run_file: Path,
    texts_folder: Path,
    finished_run: Path,
    tmp_path: Path,
) -> None:
    prepare([texts_folder], tmp_path / "bpe", PrepareConfig(vocab_size=300))
    assert pyper("train", run_file, "--set", f"data.path={tmp_path / 'bpe'}").exit_code == 0
    error, hint = refused(
        "mix", finished_run, "--add", f"more={tmp_path / 'run'}:0", "-o", tmp_path / "new"
    )
    assert "another tokenizer" in error
    assert "--tokenizer" in hint


def test_a_second_run_on_the_same_folder(refused: Refused, run_file: Path, tmp_path: Path) -> None:
    with folder_lock(tmp_path / "run" / "seed"):
        error, hint = refused("train", run_file)
    assert "in use by process" in error
    assert "another folder" in hint


def test_other_settings_on_the_same_folder(refused: Refused, pyper: Pyper, run_file: Path) -> None:
    pyper("assign", run_file)
    error, hint = refused("train", run_file, "--set", "train.beta2=0.9")
    assert "`train.beta2` was 0.95, now it is 0.9" in error
    assert "run.folder" in hint


def test_a_stage_before_its_turn(refused: Refused, run_file: Path) -> None:
    error, hint = refused("train", run_file, "--only", "expert:0")
    assert "seed is not trained" in error
    assert "--only seed" in hint
    error, hint = refused("mix", run_file)
    assert "expert 0 (`sums`) is not trained" in error
    error, hint = refused("evaluate", run_file)
    assert hint


def test_a_folder_that_cannot_be_written(refused: Refused, run_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        error, hint = refused("train", run_file, "--set", f"run.folder={folder}")
        assert str(tmp_path / "file") in error
        assert hint


def test_an_output_that_cannot_be_written(
    refused: Refused, texts_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    error, _ = refused("prepare", texts_folder, "-o", tmp_path / "file" / "data")
    assert str(tmp_path / "file") in error


def test_a_damaged_mixture(refused: Refused, finished_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished_run / "mixture", tmp_path / "mixture")
    file = folder / "router.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    error, _ = refused("generate", folder)
    assert "router.safetensors" in error


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    pyper: Pyper, run_file: Path, tmp_path: Path
) -> None:
    assert pyper("train", run_file, "--only", "seed").exit_code == 0
    newest = max((tmp_path / "run" / "seed" / "checkpoints").iterdir())
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "model.safetensors").write_bytes(content)

    done = pyper("train", run_file, "--only", "seed")

    assert done.exit_code == 0
    assert "warning:" in done.stderr
    assert "using an earlier checkpoint" in done.stderr
