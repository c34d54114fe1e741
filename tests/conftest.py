"""What the tests of training, stages and the command line share: a small data folder."""

import io
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

# Triton looks once, when it is imported: without a GPU its interpreter runs the kernels.
os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))

from pyper.config import PrepareConfig, RunConfig, parse_run
from pyper.config.load import apply_override
from pyper.data import TokenData, prepare
from pyper.stages.context import Context, open_context
from pyper.stages.pipeline import run_pipeline

DOMAINS = {
    "sums": ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "+", "-", "="],
    "tales": ["the", "fox", "and", "the", "crow", "met", "by", "a", "mill", "near", "the", "sea"],
}


def write_texts(folder: Path, *, documents: int = 60, words: int = 24) -> Path:
    """One sub-folder of texts per domain, the same ones every time."""
    for seed, (domain, vocabulary) in enumerate(DOMAINS.items()):
        rng = random.Random(seed)
        (folder / domain).mkdir(parents=True)
        for number in range(documents):
            text = f"{number}: " + " ".join(rng.choices(vocabulary, k=words))
            (folder / domain / f"{number:03d}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def texts_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains, `sums` and `tales`."""
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def data_folder(texts_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The texts in bytes, prepared."""
    output = tmp_path_factory.mktemp("prepared") / "data"
    config = PrepareConfig(tokenizer="bytes", valid_fraction=0.1, test_fraction=0.1)
    prepare([texts_folder], output, config)
    return output


@pytest.fixture(scope="session")
def two_domains(data_folder: Path) -> TokenData:
    return TokenData.open(data_folder)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Bitwise comparisons need equal numbers of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


NewRun = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def new_run(data_folder: Path) -> NewRun:
    """A run of two experts in seconds; `settings` are as for `--set`."""

    def build(folder: Path, *settings: str) -> RunConfig:
        values: dict[str, Any] = {
            "run": {"folder": str(folder), "device": "cpu"},
            "data": {"path": str(data_folder), "seq_len": 16, "loader_workers": 0},
            "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 32},
            "mixture": {"n_experts": 2, "assign": "folder"},
            "train": {
                "steps": 8,
                "global_batch_tokens": 64,
                "eval_every": 1,
                "eval_tokens": 32,
                "log_every": 1,
                "precision": "fp32",
            },
            "evaluate": {"tokens": 128, "prefixes": [4, 8]},
        }
        for setting in settings:
            apply_override(values, setting)
        return parse_run(values)

    return build


def open_quietly(run: RunConfig) -> Context:
    return open_context(run, Console(file=io.StringIO(), width=300))


@pytest.fixture(scope="session")
def finished_run(new_run: NewRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, trained, mixed and evaluated; tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run_pipeline(open_quietly(new_run(folder)))
    torch.set_num_threads(threads)
    return folder
