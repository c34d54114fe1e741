"""`[data]`, and the settings of `pyper prepare`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pyper.config.base import Section

Weight = Annotated[float, Field(ge=0, le=1000)]


class DataConfig(Section):
    """What the experts read."""

    path: Path = Path("data")
    """A folder written by `pyper prepare`."""
    seq_len: int = Field(default=1024, ge=8)
    """Tokens per training sequence."""
    loader_workers: int = Field(default=1, ge=0, le=64)
    """Threads that read ahead; the batches are the same for any number."""
    weights: dict[str, Weight] = Field(default_factory=dict)
    """How often an epoch sees a domain, by its name: `{ law = 2.0, novels = 0.5 }` reads law twice
    and a different half of the novels each time. 1.0 where a domain is not named."""


class PrepareConfig(Section):
    """How text becomes token shards."""

    tokenizer: str = "bpe"
    """`bpe` trains one on the data, `bytes` needs none, or the path of a `tokenizer.json`."""
    vocab_size: int = Field(default=4096, ge=257, le=1_000_000)
    """Entries of a trained BPE, the special ones included."""
    valid_fraction: float = Field(default=0.05, ge=0, lt=0.5)
    test_fraction: float = Field(default=0.05, ge=0, lt=0.5)
    min_chars: int = Field(default=1, ge=1)
    """Shorter documents are left out (and counted)."""
    split_by: Literal["document", "blank-line", "file"] = "document"
    """`document` and `file` take a text file whole, `blank-line` cuts it at empty lines."""
    text_key: str = "text"
    """The key that holds the text in `.jsonl` and `.parquet`."""
    shard_tokens: int = Field(default=100_000_000, ge=1024)
