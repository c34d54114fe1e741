"""Every command on a miniature run: help, tables, JSON, exit codes."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pyper.checkpoint import load_checkpoint
from pyper.config import list_presets

pytestmark = pytest.mark.usefixtures("one_thread")

Pyper = Callable[..., Any]
COMMANDS = (
    "quickstart",
    "doctor",
    "prepare",
    "assign",
    "train",
    "mix",
    "evaluate",
    "generate",
    "inspect",
)


def test_help_imports_neither_torch_nor_pydantic() -> None:
    code = (
        "import sys; sys.argv = ['pyper', '--help']\n"
        "from pyper.cli.main import run\n"
        "try: run()\n"
        "except SystemExit as end: assert not end.code\n"
        "print([m for m in ('torch', 'pydantic', 'numpy') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_an_example_and_offers_json(pyper: Pyper, command: str) -> None:
    done = pyper(command, "--help")
    assert done.exit_code == 0
    assert f"Example: pyper {command}" in done.stdout.replace("`", "")
    assert "--json" in done.stdout


def test_version(pyper: Pyper) -> None:
    done = pyper("--version")
    assert done.exit_code == 0
    assert done.stdout.startswith("pyper ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("trian",),
        ("train",),
        ("train", "small", "--no-such-option"),
        ("generate", "x", "-n", "many"),
        ("prepare", "x"),
    ],
)
def test_wrong_usage_exits_2(pyper: Pyper, arguments: tuple[str, ...]) -> None:
    assert pyper(*arguments).exit_code == 2


def test_tuning_names_the_model_that_it_starts_from_and_is_not_there(
    pyper: Pyper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = pyper("train", "tune", "--dry-run")
    assert result.exit_code == 1
    assert "models/merged" in result.stderr
    assert "hint" in result.stderr


@pytest.mark.parametrize("name", [name for name in list_presets() if name != "tune"])
def test_every_shipped_run_file_passes_a_dry_run(
    pyper: Pyper, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table = pyper("train", name, "--dry-run")
    planned = json.loads(pyper("train", name, "--dry-run", "--json").stdout)

    assert table.exit_code == 0
    is_mixture = planned["run"]["mixture"]["n_experts"] > 1
    assert ("one expert" if is_mixture else "the model") in table.stdout
    assert planned["needs"]["parameters_per_expert"] > 0
    assert planned["steps"] is None
    assert planned["note"]
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_over_prepared_data_counts_steps(
    pyper: Pyper, run_file: Path, tmp_path: Path
) -> None:
    planned = json.loads(pyper("train", run_file, "--dry-run", "--json").stdout)
    assert planned["steps"] == {"seed": 4, "experts": 4, "control": 4}
    assert planned["run"]["model"]["vocab_size"] == 257
    assert "steps" in pyper("train", run_file, "--dry-run").stdout
    assert not (tmp_path / "run").exists()


def test_text_to_numbers_one_command_after_the_other(
    pyper: Pyper, texts_folder: Path, run_file: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    done = pyper("prepare", texts_folder, "-o", data, "--tokenizer", "bytes")
    assert done.exit_code == 0
    assert "sums" in done.stdout
    counts = json.loads(
        pyper("prepare", texts_folder, "-o", data, "--tokenizer", "bytes", "--json").stdout
    )
    assert counts["domains"].keys() == {"sums", "tales"}
    setting = ("--set", f"data.path={data}")

    assert "load" in pyper("assign", run_file, *setting).stdout
    assigned = json.loads(pyper("assign", run_file, *setting, "--json").stdout)
    assert assigned["experts"] == ["sums", "tales"]
    done = pyper("train", run_file, *setting, "--only", "seed")
    assert done.stdout.startswith("seed: 4 steps, validation ")
    trained = json.loads(pyper("train", run_file, *setting, "--only", "seed", "--json").stdout)
    assert trained["trained"][0]["steps"] == 4
    done = pyper("train", run_file, *setting)
    assert done.exit_code == 0
    assert "tales" in done.stdout
    again = json.loads(pyper("train", run_file, *setting, "--json").stdout)
    assert again == json.loads(pyper("evaluate", tmp_path / "run", "--json").stdout)
    assert "2 experts (sums, tales)" in pyper("mix", tmp_path / "run").stdout
    assert json.loads(pyper("mix", tmp_path / "run", "--json").stdout)["router"] == "unigram"
    assert pyper("inspect", data).exit_code == pyper("inspect", tmp_path / "run").exit_code == 0


def test_a_mixture_loses_an_expert(pyper: Pyper, finished_run: Path, tmp_path: Path) -> None:
    done = pyper("mix", finished_run, "--drop", "sums", "-o", tmp_path / "new", "--json")
    assert json.loads(done.stdout)["experts"] == ["tales"]


class TestGenerate:
    """`pyper generate`."""

    def test_writes_the_prompt_and_what_follows(self, pyper: Pyper, finished_run: Path) -> None:
        done = pyper("generate", finished_run, "-p", "the fox", "-n", 8)
        assert done.exit_code == 0
        assert done.stdout.startswith("the fox")
        assert done.stdout == pyper("generate", finished_run, "-p", "the fox", "-n", 8).stdout

    def test_json_says_who_wrote_each_token(self, pyper: Pyper, finished_run: Path) -> None:
        done = pyper("generate", finished_run, "-p", "a", "-p", "1 +", "-n", 6, "--json")
        written = json.loads(done.stdout)
        assert written["experts"] == ["sums", "tales"]
        assert [c["prompt"] for c in written["completions"]] == ["a", "1 +"]
        for completion in written["completions"]:
            assert 0 < len(completion["tokens"]) <= 6
            assert {t["expert"] for t in completion["tokens"]} <= {"sums", "tales"}

    @pytest.mark.parametrize("expert", ["tales", "1"])
    def test_one_expert_writes_alone(self, pyper: Pyper, finished_run: Path, expert: str) -> None:
        done = pyper("generate", finished_run, "--expert", expert, "-n", 4, "--json")
        written = json.loads(done.stdout)
        assert written["experts"] == ["tales"]

    def test_show_experts_ends_with_shares(self, pyper: Pyper, finished_run: Path) -> None:
        done = pyper("generate", finished_run, "-p", "the", "-n", 6, "--show-experts")
        assert "— " in done.stdout
        assert "%" in done.stdout

    @pytest.mark.parametrize("mixing", ["posterior", "top1", "window"])
    def test_mixing_can_be_chosen(self, pyper: Pyper, finished_run: Path, mixing: str) -> None:
        done = pyper("generate", finished_run, "--mixing", mixing, "-n", 4, "--resident", 1)
        assert done.exit_code == 0


def test_inspect_exits_1_when_a_bit_has_flipped(
    pyper: Pyper, finished_run: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished_run, tmp_path / "copy", symlinks=True)
    assert pyper("inspect", folder, "--json").exit_code == 0
    file = folder / "seed" / "best" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)

    done = pyper("inspect", folder)

    assert done.exit_code == 1
    assert "model.safetensors" in done.stdout
    assert json.loads(pyper("inspect", folder, "--json").stdout)["damaged"]


def test_doctor_looks_at_everything(pyper: Pyper) -> None:
    done = pyper("doctor")
    findings = json.loads(pyper("doctor", "--json").stdout)["findings"]
    assert {"Python", "torch", "CPU", "memory", "disk here"} <= {f["what"] for f in findings}
    assert "Python" in done.stdout
    assert done.exit_code == int(any(f["ok"] is False for f in findings))


def test_sigterm_saves_at_a_step_and_exits_143(
    start: Callable[..., "subprocess.Popen[str]"], run_file: Path, tmp_path: Path
) -> None:
    command = (
        "train",
        run_file,
        "--only",
        "seed",
        "--set",
        "train.steps=4000",
        "--set",
        "train.eval_every=100000",
        "--set",
        "train.seed_fraction=0.9",
    )
    process = start(*command)
    metrics = tmp_path / "run" / "seed" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.is_file() and metrics.stat().st_size > 500):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)

    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)

    assert process.returncode == 143
    assert "state saved" in stderr
    assert "run the same command again to go on" in stderr
    assert "Traceback" not in stderr
    (checkpoint,) = (tmp_path / "run" / "seed" / "checkpoints").iterdir()
    step = load_checkpoint(checkpoint).step
    logged = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert logged[-1] == step
    assert torch.isfinite(load_checkpoint(checkpoint).model["head.weight"]).all()
