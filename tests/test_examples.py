"""The examples run as a user runs them, one after another in an empty folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
LONGEST = 20  # seconds on a CPU


def run(name: str, folder: Path, *arguments: str) -> str:
    """What it prints; warnings are errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / name, *arguments],
        cwd=folder,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=3 * LONGEST,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which `two_folders.py` ran, and what it printed."""
    folder = tmp_path_factory.mktemp("examples")
    return folder, run("two_folders.py", folder)


def test_every_example_is_short_and_run_here_or_beside_what_it_shows() -> None:
    named = Path(__file__).read_text() + "span_masked_qa.py"  # tests/train
    for file in EXAMPLES.glob("*.py"):
        assert f'"{file.name}"' in named or file.name == "span_masked_qa.py"
        if file.name != "span_masked_qa.py":
            assert len(file.read_text().splitlines()) <= 60, file
    manual = (EXAMPLES.parent / "docs" / "python.md").read_text()
    assert all(file.name in manual for file in EXAMPLES.glob("*.py"))


def test_a_mixture_from_two_folders(trained: tuple[Path, str]) -> None:
    _, printed = trained
    control, mixture = (float(line.split()[0]) for line in printed.splitlines()[:2])
    assert mixture < control + 0.1 < 2.5  # nine or ten words at random: ln 9 = 2.2
    assert "sums, tales" in printed
    assert "1: two plus|" in printed


@pytest.mark.slow
def test_folders_of_ones_own(tmp_path: Path) -> None:
    for domain, words in {"sea": "wave ship wind", "law": "court claim act"}.items():
        (tmp_path / domain).mkdir()
        for i in range(60):
            text = " ".join(f"{word} {i * k % 7}" for k in range(9) for word in words.split())
            (tmp_path / domain / f"{i}.txt").write_text(f"{i} {text}")
    printed = run("two_folders.py", tmp_path, "sea", "law")
    assert "law, sea" in printed or "sea, law" in printed


def test_who_wrote_it(trained: tuple[Path, str]) -> None:
    folder, _ = trained
    printed = run("who_wrote_it.py", folder, "runs/two-folders", "1: two plus three")
    *pieces, shares = printed.splitlines()
    assert "'1: two plus three'" in pieces[0]
    assert pieces[1].split()[0] == "sums"
    assert "%" in shares


def test_score_documents(trained: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = trained
    lines = run("score_documents.py", folder).splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["sums", "tales"]
    (tmp_path / "letter.txt").write_text("the fox met a crow near the mill")
    [line] = run(
        "score_documents.py", folder, "runs/two-folders", str(tmp_path / "letter.txt")
    ).splitlines()
    assert line.split()[0] == "tales"
    assert "letter.txt" in line


@pytest.mark.slow
def test_merge_experts(trained: tuple[Path, str]) -> None:
    folder, _ = trained
    printed = run("merge_experts.py", folder)
    losses = {line.split(": ")[-1]: float(line.split()[0]) for line in printed.splitlines()[:5]}
    assert losses["merged"] < losses["average"]
    assert "after tuning" in printed


def test_train_on_strings(tmp_path: Path) -> None:
    printed = run("train_on_strings.py", tmp_path)
    known, mixed_up = (float(line.split()[0]) for line in printed.splitlines()[-2:])
    assert known < 1 < mixed_up
    assert list(tmp_path.iterdir()) == []
