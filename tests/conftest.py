"""What the tests of training, stages and the command line share: a small data folder."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pyper.config import PrepareConfig
from pyper.data import TokenData, prepare

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
