"""A run folder that was copied or moved: commands work in the folder they are given."""

import json
import shutil
from pathlib import Path

import pytest

from cli.conftest import Pyper

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def old(finished_run: Path, tmp_path: Path) -> Path:
    """A finished run whose own settings say where it is."""
    folder = Path(shutil.copytree(finished_run, tmp_path / "old", symlinks=True))
    settings = (folder / "run.toml").read_text()
    assert str(finished_run) in settings
    (folder / "run.toml").write_text(settings.replace(str(finished_run), str(folder)))
    return folder


def state_of(folder: Path) -> dict[Path, int]:
    """When each file was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("part", ["", "run.toml"], ids=["folder", "file"])
@pytest.mark.parametrize("command", ["train", "evaluate", "mix"])
def test_a_command_on_a_copy_writes_to_the_copy_alone(
    pyper: Pyper, old: Path, tmp_path: Path, command: str, part: str
) -> None:
    new = Path(shutil.copytree(old, tmp_path / "new", symlinks=True))
    shutil.rmtree(new / "mixture")
    (new / "evaluation.json").unlink()
    before = state_of(old)
    assert pyper("mix", new / part).exit_code == 0  # `evaluate` wants a mixture
    assert pyper(command, new / part).exit_code == 0
    assert (new / "mixture").is_dir()
    assert (new / "evaluation.json").is_file() == (command != "mix")
    assert state_of(old) == before


def test_a_run_that_was_moved_goes_on_where_it_is(pyper: Pyper, old: Path, tmp_path: Path) -> None:
    new, merged = old.rename(tmp_path / "new"), tmp_path / "merged"
    before = (new / "evaluation.json").read_text()
    trained = state_of(new / "experts")
    assert json.loads(pyper("train", new, "--json").stdout) == json.loads(before)
    assert state_of(new / "experts") == trained
    assert pyper("merge", new, "-o", merged).exit_code == 0
    assert pyper("generate", new, "-p", "1 +", "-n", 4).exit_code == 0
    assert f'folder = "{new}"' in (new / "run.toml").read_text()
    assert not old.exists()
