"""A small data folder, made once: what the tests read is never written to."""

from pathlib import Path

import pytest
from small_corpus import make_texts, write_jsonl

from pyper.config import PrepareConfig
from pyper.data import Documents, TokenData, prepare


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "poems.jsonl", make_texts(150, seed=1))
    write_jsonl(folder / "letters.jsonl", make_texts(100, seed=2))
    return folder


@pytest.fixture(scope="session")
def data(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    """Two domains in bytes, in several shards."""
    output = tmp_path_factory.mktemp("data") / "out"
    config = PrepareConfig(
        tokenizer="bytes", shard_tokens=4096, valid_fraction=0.1, test_fraction=0.1
    )
    prepare([corpus], output, config)
    return TokenData.open(output)


@pytest.fixture(scope="session")
def documents(data: TokenData) -> Documents:
    return data.documents("train")
