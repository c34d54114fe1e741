"""What README and docs/python.md print works as printed (with a smaller model, so that it takes
seconds)."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from pyper.cli.main import app
from pyper.config import parse_run
from pyper.stages.toml import to_toml

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
SMALLER = (
    "model.d_model=16 model.n_layers=1 model.n_heads=2 data.seq_len=32 mixture.n_experts=2 "
    "train.steps=8 train.global_batch_tokens=128 train.precision=fp32 train.eval_tokens=64 "
    "evaluate.tokens=256"
)
# A merged model has its shape.
TUNED_SMALLER = (
    "data.path=data/mine data.seq_len=32 train.steps=4 train.global_batch_tokens=128 "
    "train.precision=fp32 train.eval_tokens=64 evaluate.tokens=256 train.micro_batch_size=4"
)
# Commands that do not end by themselves, or take minutes, and the tests that run them.
ELSEWHERE = {
    "quickstart": "tests/slow/test_quickstart.py",
    "serve": "tests/serve/test_manual.py",
    "chat": "tests/cli/test_chat_command.py",
    "evaluate sparse --leak-probe": "tests/slow/test_leak_probe.py",
    "export": "tests/cli/test_export_command.py",
    "import": "tests/cli/test_import_command.py",
}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands_in(text: str) -> list[list[str]]:
    """The `pyper` lines of shell blocks, without `pyper`."""
    lines = [
        shlex.split(line, comments=True)
        for block in blocks(text, "sh")
        for line in block.splitlines()
    ]
    return [line[1:] for line in lines if line and line[0] == "pyper"]


def commands_in_prose() -> list[list[str]]:
    """`pyper merge RUN -o MODEL` and the like, in the text and in tables."""
    outside = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    found = (shlex.split(span) for span in re.findall(r"`pyper ([^`]+)`", outside))
    return [words for words in found if len(words) > 1 or words[0] in ("doctor", "quickstart")]


def section(heading: str) -> str:
    return README.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]


def invoke(command: list[str]) -> Result:
    kinds = {("train", "tune"): TUNED_SMALLER, ("train", "small"): SMALLER}
    changes = kinds.get((command[0], command[1] if len(command) > 1 else ""), "")
    extra = [part for setting in changes.split() for part in ("--set", setting)]
    result = CliRunner().invoke(app, [*command, *extra], catch_exceptions=False)
    assert result.exit_code == 0, (command, result.output)
    return result


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the commands for one's own text have run."""
    folder = tmp_path_factory.mktemp("readme")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for domain, words in {"sea": "wave ship harbour", "law": "court party claim"}.items():
            (folder / "texts" / domain).mkdir(parents=True)
            for i in range(60):
                text = " ".join(f"{word} {i * k}" for k in range(9) for word in words.split())
                (folder / "texts" / domain / f"{i}.txt").write_text(text)
        commands = commands_in(section("Your own text"))
        assert [c[0] for c in commands] == ["prepare", "train", "train", "generate"]
        for command in commands:
            invoke(command)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return home


def test_the_commands_for_ones_own_text_run_in_order(home: Path) -> None:
    assert (home / "runs" / "mine" / "evaluation.json").is_file()


def test_every_command_that_the_text_names_runs(at_home: Path) -> None:
    """RUN, SRC… and the others are there, under these very names."""
    for name, target in {"RUN": "runs/mine", "PATH": "runs/mine", "SRC…": "texts"}.items():
        (at_home / name).symlink_to(target)
    values = tomllib.loads((at_home / "runs" / "mine" / "run.toml").read_text())
    values["run"]["folder"] = "runs/own"
    (at_home / "RUN.toml").write_text(to_toml(values))

    commands = commands_in_prose()
    assert len(commands) > 12
    for command in commands:
        if not (ELSEWHERE.keys() & {command[0], " ".join(command)}):
            invoke(command)

    assert (at_home / "MODEL" / "config.json").is_file()
    assert (at_home / "models" / "merged" / "config.json").is_file()
    assert (at_home / "DATA" / "manifest.json").is_file()


def test_every_command_of_a_shell_block_is_run_by_a_test() -> None:
    run_above = commands_in(section("Your own text")) + commands_in(section("From Python"))
    for command in commands_in(README):
        assert command in run_above or command[0] in ELSEWHERE, command


@pytest.mark.parametrize(("command", "file"), ELSEWHERE.items())
def test_what_is_run_elsewhere_is_named_there(command: str, file: str) -> None:
    source = (ROOT / file).read_text(encoding="utf-8")
    assert [word for word in command.split() if f'"{word}"' not in source] == []


def test_no_command_has_two_rows() -> None:
    rows = re.findall(r"^\| `(pyper \w+)", README, re.MULTILINE)
    assert len(rows) > 12
    assert len(set(rows)) == len(rows)


@pytest.mark.usefixtures("data_sets_at_home")
def test_the_tasks_of_the_readme_run(at_home: Path) -> None:
    pytest.importorskip("lm_eval")
    [command] = commands_in(section("From Python"))
    (at_home / "tests").symlink_to(ROOT / "tests")
    assert "pyper_sums" in invoke(command).output


@pytest.fixture
def data_sets_at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "cache")


@pytest.mark.parametrize(
    "program",
    [*blocks(README, "python"), *blocks(PYTHON, "python")],
    ids=lambda program: re.findall(r"pyper\.(\w+)", program)[0],
)
def test_programs_run_as_printed(at_home: Path, program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=at_home,
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout


@pytest.mark.parametrize("name", ["README.md", "docs/python.md"])
def test_every_link_to_a_file_leads_somewhere(name: str) -> None:
    file = ROOT / name
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", file.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (file.parent / link).exists()] == []


def test_the_run_file_of_the_readme_is_a_run_file() -> None:
    [text] = blocks(README, "toml")
    run = parse_run(tomllib.loads(text))
    assert run.expert[0].name == "law"
