"""`make bench`: every script runs without arguments, and writes what its numbers depend on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def printed_by(script: str, *arguments: object) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_loader_writes_its_numbers_and_the_machine(tmp_path: Path) -> None:
    shorter = ("--seconds", 0.1, "--tokens", 300_000)
    table = printed_by("loader.py", *shorter, "--json", tmp_path / "loader.json")

    assert "mean-300" in table
    record = json.loads((tmp_path / "loader.json").read_text())
    assert record.keys() == {"benchmark", "commit", "command", "hardware", "results"}
    assert record["hardware"]["cores"] >= 1
    speeds = record["results"]["million_tokens_per_second_by_workers"]
    assert all(speed > 0 for row in speeds.values() for speed in row.values())


def test_without_its_text_tiny_shakespeare_says_what_it_needs() -> None:
    assert "input.txt" in printed_by("tiny_shakespeare.py")


def test_without_data_the_table_of_sparse_models_says_what_it_needs() -> None:
    assert "--data" in printed_by("sparse_table.py")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it would take minutes")
def test_one_expert_beside_transformers_is_tiny_where_there_is_no_gpu(tmp_path: Path) -> None:
    rows = ["transformers eager", "Pyper eager"]
    printed = printed_by("train_expert.py", "--only", *rows, "--json", tmp_path / "train.json")

    assert "No GPU" in printed
    results = json.loads((tmp_path / "train.json").read_text())["results"]
    assert all(results[row]["tokens_per_second"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("wrong", "code", "word"), [(("--width", 64), 2, "128"), (("--optimizer", "sdg"), 1, "nothing")]
)
def test_one_expert_that_cannot_be_measured_is_no_success(
    wrong: tuple[object, ...], code: int, word: str
) -> None:
    command = [sys.executable, str(BENCHMARKS / "train_expert.py"), "--only", "Pyper eager"]
    done = subprocess.run([*command, *map(str, wrong)], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert word in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it would train for minutes")
def test_without_a_gpu_the_large_expert_says_what_it_needs() -> None:
    assert "needs a GPU with about 5" in printed_by("large_expert.py")


def test_a_smaller_expert_trains_stops_resumes_and_writes(tmp_path: Path) -> None:
    smaller = ("--preset", "quickstart", "--device", "cpu", "--steps", 6, "--batch-tokens", 512)
    printed_by("large_expert.py", *smaller, "--json", tmp_path / "expert.json")

    results = json.loads((tmp_path / "expert.json").read_text())["results"]
    assert results["steps"] == [1, 2, 3, 4, 5, 6]
    assert results["generated"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it would take minutes")
def test_decoding_is_measured_on_a_tiny_model_where_there_is_no_gpu(tmp_path: Path) -> None:
    rows = ["transformers, dynamic cache", "plain CUDA graph", "Pyper compiled, two experts"]
    printed = printed_by("decode.py", "--only", *rows, "--json", tmp_path / "decode.json")

    assert "There is no GPU" in printed
    results = json.loads((tmp_path / "decode.json").read_text())["results"]["rows"]
    assert list(results) == rows
    assert all(row["batch 1"] > 0 and row["batch 4"] > 0 for row in results.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it would take minutes")
def test_decoding_is_measured_against_batch_and_context(tmp_path: Path) -> None:
    tiny = ("--layers", 1, "--width", 128, "--vocabulary", 512)
    cells = ("--batches", 1, 3, "--contexts", 16, 32)
    table = printed_by("decode_grid.py", *tiny, *cells, "--json", tmp_path / "grid.json")

    assert "context 32" in table
    assert "batch 3" in table
    results = json.loads((tmp_path / "grid.json").read_text())["results"]["tokens_per_second"]
    assert {context: list(row) for context, row in results.items()} == {
        "16": ["1", "3"],
        "32": ["1", "3"],
    }
    assert all(value > 0 for row in results.values() for value in row.values())


def test_parity_with_transformers_is_printed_for_every_family(tmp_path: Path) -> None:
    table = printed_by("parity.py", "--json", tmp_path / "parity.json")
    results = json.loads((tmp_path / "parity.json").read_text())["results"]
    assert results.keys() == {"Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Olmo2", "Arcee"}
    assert all(family in table for family in results)
