"""The README's commands work as printed (with a smaller model, so that it takes seconds)."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pyper.cli.main import app
from pyper.config import parse_run

README = Path(__file__).parents[1] / "README.md"
SMALLER = (
    "model.d_model=16 model.n_layers=1 model.n_heads=2 data.seq_len=32 mixture.n_experts=2 "
    "train.steps=8 train.global_batch_tokens=128 train.precision=fp32 train.eval_tokens=64 "
    "evaluate.tokens=256"
)


def commands_of(heading: str) -> list[list[str]]:
    """The `pyper` lines of the first shell block below a heading."""
    section = README.read_text(encoding="utf-8").split(f"## {heading}\n", 1)[1]
    match = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert match is not None
    lines = [shlex.split(line, comments=True) for line in match[1].splitlines()]
    return [line[1:] for line in lines if line and line[0] == "pyper"]


def test_the_commands_for_ones_own_text_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for domain, words in {"sea": "wave ship harbour wind", "law": "court party claim act"}.items():
        folder = tmp_path / "texts" / domain
        folder.mkdir(parents=True)
        for i in range(40):
            text = " ".join(f"{word} {i * k}" for k in range(9) for word in words.split())
            (folder / f"{i}.txt").write_text(text)
    commands = commands_of("Your own text")
    assert [c[0] for c in commands] == ["prepare", "train", "train", "generate"]

    for command in commands:
        smaller = [p for s in SMALLER.split() for p in ("--set", s)] if "train" in command else []
        result = CliRunner().invoke(app, [*command, *smaller], catch_exceptions=False)
        assert result.exit_code == 0, result.output

    assert (tmp_path / "runs" / "mine" / "evaluation.json").is_file()


def test_every_link_to_a_file_leads_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []


def test_the_run_file_of_the_readme_is_a_run_file() -> None:
    match = re.search(r"```toml\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert match is not None
    run = parse_run(tomllib.loads(match[1]))
    assert run.expert[0].name == "law"
