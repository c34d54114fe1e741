"""What people get wrong: one line that says what, one that says what to do, and no traceback."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import Pyper, Refused

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_missing_run_file_names_the_nearest(refused: Refused, run_file: Path) -> None:
    error, hint = refused("train", run_file.with_name("mind.toml"))
    assert "no run file" in error
    assert "mine.toml" in hint


def test_missing_text(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    error, hint = refused("prepare", tmp_path / "text", "-o", tmp_path / "data")
    assert str(tmp_path / "text") in error
    assert "texts" in hint


def test_missing_data(refused: Refused, run_file: Path, tmp_path: Path) -> None:
    error, hint = refused("train", run_file, "--set", f"data.path={tmp_path / 'nothing'}")
    assert "nothing" in error
    assert "prepare" in hint


def test_missing_model(refused: Refused, tmp_path: Path) -> None:
    error, _ = refused("generate", tmp_path / "nothing")
    assert "nothing" in error
    error, _ = refused("inspect", tmp_path / "nothing")
    assert "nothing" in error


def test_an_unknown_key(refused: Refused, run_file: Path) -> None:
    error, hint = refused("train", run_file, "--set", "train.learning_rat=1")
    assert (error, hint) == (
        "unknown key `train.learning_rat`",
        "did you mean `learning_rate`?",
    )


def test_a_value_out_of_range(refused: Refused, run_file: Path) -> None:
    error, _ = refused("train", run_file, "--set", "train.beta1=2")
    assert error == "`train.beta1`: input should be less than 1, not 2"


def test_square_brackets_of_messages_are_shown(refused: Refused, run_file: Path) -> None:
    error, _ = refused("train", run_file, "--set", "run.jobs=[1]")
    assert error.endswith("not [1]")


@pytest.mark.parametrize("path", ["sums", "[red]text[/red]"])
def test_a_path_is_never_taken_for_markup(refused: Refused, tmp_path: Path, path: str) -> None:
    error, _ = refused("inspect", tmp_path / path)
    assert str(tmp_path / path) in error


def test_a_vocabulary_that_is_not_the_data_s(refused: Refused, run_file: Path) -> None:
    error, hint = refused("train", run_file, "--set", "model.vocab_size=1000")
    assert "1,000" in error
    assert "257" in error
    assert "leave `model.vocab_size` out" in hint


def test_empty_data_says_what_was_seen(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("")
    (tmp_path / "texts" / "b.txt").write_text("  \n")
    error, hint = refused("prepare", tmp_path / "texts", "-o", tmp_path / "data")
    assert "2" in error + hint
    assert not (tmp_path / "data").exists()


def test_too_little_data(refused: Refused, run_file: Path) -> None:
    error, hint = refused(
        "train",
        run_file,
        "--set",
        "data.seq_len=65536",
        "--set",
        "train.global_batch_tokens=65536",
    )
    assert "65,536" in error
    assert "data.seq_len" in hint


def test_a_prompt_that_is_too_long(refused: Refused, finished_run: Path) -> None:
    error, hint = refused("generate", finished_run, "-p", "x" * 100)
    assert "16" in error
    assert hint


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize(
    "option",
    [
        ("--max-new-tokens", 0),
        ("--temperature", -1),
        ("--temperature", "nan"),
        ("--top-k", 0),
        ("--top-p", 2),
        ("--min-p", -1),
        ("--repetition-penalty", 0),
        ("--seed", 2**64),
    ],
)
def test_sampling_settings_out_of_range_are_wrong_usage(
    refused: Refused, finished_run: Path, command: str, option: tuple[str, object]
) -> None:
    error, hint = refused(command, finished_run, *option, code=2)
    assert f"not {option[1]}" in error
    assert hint == f"change `{option[0]}`"


def test_a_prompt_that_is_no_text(refused: Refused, finished_run: Path) -> None:
    error, _ = refused("generate", finished_run, "-p", "\udcff", "--json")
    assert "not UTF-8" in error


def test_no_expert_in_memory_at_all(pyper: Pyper, finished_run: Path) -> None:
    assert pyper("generate", finished_run, "--resident", 0).exit_code == 2


def test_long_messages_are_not_cut_into_lines(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    error, _ = refused("inspect", tmp_path / "nowhere")
    assert error == f"there is no folder `{tmp_path / 'nowhere'}`"


def test_an_unknown_expert(refused: Refused, finished_run: Path) -> None:
    error, hint = refused("generate", finished_run, "--expert", "law")
    assert "`law`" in error
    assert "sums, tales" in hint


def test_an_unknown_way_of_mixing(refused: Refused, finished_run: Path) -> None:
    error, hint = refused("generate", finished_run, "--mixing", "average")
    assert "`average`" in error
    assert "posterior" in hint


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("generate RUN --expert sums --mixing top1", ("expert `sums` alone", "`mixing`")),
        ("mix RUN --drop sums -o NEW --set run.jobs=2", ("`--drop`", "`--set`")),
        ("mix RUN --output NEW --set run.jobs=2", ("`--output`", "`--set`")),
        ("train RUN --only seed --jobs 2", ("`--only`", "`--jobs`")),
        ("train RUN --only seed --dry-run", ("`--only`", "`--dry-run`")),
        ("inspect RUN --mfu 0.5", ("`--mfu`", "`--plan`")),
        ("prepare RUN -o NEW --tokenizer bytes --vocab-size 4096", ("bytes`", "`--vocab-size`")),
        ("prepare RUN -o NEW --columns text=a --text-key text", ("text=…`", "`--text-key`")),
        ("merge RUN -o NEW --add RUN:sums --attention soft", ("`--add`", "`--attention`")),
        ("merge RUN -o NEW --average --top-k 2", ("`--average`", "`--top-k`")),
        ("merge RUN -o NEW --upcycle 2 --router means", ("`--upcycle`", "`--router`")),
        ("merge RUN -o NEW --noise 0.01", ("`--noise`", "`--upcycle`")),
        ("merge RUN -o NEW --routing capped --top-k 2", ("capped`", "`--top-k`")),
        ("evaluate RUN --tasks x --leak-probe", ("`--tasks`", "`--leak-probe`")),
        ("evaluate RUN --tasks x --set run.jobs=2", ("`--tasks`", "`--set`")),
        ("evaluate RUN --batch-tokens 64", ("`--batch-tokens`", "`--tasks`")),
        ("mix RUN --drop sums", ("`--drop`", "new mixture")),
        ("export RUN -o NEW --architecture pyper --to gguf", ("`--architecture", "modelling file")),
        ("export RUN -o NEW --shard-gb 5 --to gguf", ("`--shard-gb`", "a GGUF file is one file")),
        ("export RUN -o NEW --expert sums --mixing top1", ("expert `sums` alone", "`mixing`")),
        ("serve RUN --api-key a --api-key-file b", ("two", "API keys")),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(
    refused: Refused, finished_run: Path, tmp_path: Path, arguments: str, named: tuple[str, str]
) -> None:
    filled = arguments.replace("RUN", str(finished_run)).replace("NEW", str(tmp_path / "new"))
    error, hint = refused(*filled.split(), code=2)
    assert all(name in error for name in named), error
    assert hint
    assert not (tmp_path / "new").exists()


def test_an_unknown_device(refused: Refused, finished_run: Path) -> None:
    error, hint = refused("generate", finished_run, "--device", "abacus")
    assert "`abacus`" in error
    assert "doctor" in hint


def test_an_unknown_part(refused: Refused, run_file: Path) -> None:
    error, hint = refused("train", run_file, "--only", "expert:law")
    assert "expert:law" in error
    assert "sums, tales" in hint


def test_a_missing_extra(refused: Refused, run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent: Any = None
    monkeypatch.setitem(sys.modules, "wandb", absent)
    error, hint = refused("train", run_file, "--set", "track.wandb=mine")
    assert "`track.wandb` needs the package `wandb`" in error
    assert "pip install 'pyper[track]'" in hint


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full disk here")
@pytest.mark.parametrize("how", [["--json"], []], ids=["json", "tables"])
def test_a_result_that_finds_no_room_is_an_error_in_words(how: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "pyper.cli.main", "inspect", "--plan", "small", *how]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
