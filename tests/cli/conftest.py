"""The command line, in this process and in another."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyper.cli import main
from pyper.stages.toml import to_toml


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def complaint(self) -> list[str]:
        """The lines that begin with `error:` or `hint:`."""
        return [x for x in self.stderr.splitlines() if x.startswith(("error:", "hint:"))]


Pyper = Callable[..., Ended]
Refused = Callable[..., tuple[str, str]]


@pytest.fixture
def pyper(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """Run `pyper ARGUMENTS` here, with a terminal so wide that nothing wraps."""
    monkeypatch.setenv("COLUMNS", "400")

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["pyper", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main.run()
        captured = capsys.readouterr()
        return Ended(int(ended.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def refused(pyper: Pyper) -> Refused:
    """Run a command that must fail; gives its error and its hint."""

    def run(*arguments: object, code: int = 1) -> tuple[str, str]:
        done = pyper(*arguments)
        assert done.exit_code == code, done
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
        assert [line.split(":")[0] for line in done.complaint] == ["error", "hint"], done.stderr
        error, hint = done.complaint
        return error.removeprefix("error: "), hint.removeprefix("hint: ")

    return run


def start_process(*arguments: object, cwd: Path) -> subprocess.Popen[str]:
    """`pyper ARGUMENTS` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "pyper.cli.main", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
    )


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    return lambda *arguments: start_process(*arguments, cwd=tmp_path)


@pytest.fixture
def run_file(new_run: Callable[..., object], tmp_path: Path) -> Path:
    """The small run as a file; its folder is `tmp_path/run`."""
    run = new_run(tmp_path / "run")
    path = tmp_path / "mine.toml"
    path.write_text(to_toml(run.model_dump(mode="json", exclude_none=True)))  # type: ignore[attr-defined]
    return path
