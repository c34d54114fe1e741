"""`[data]`, and the settings of `pyper prepare`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from pyper.config.base import Section
from pyper.config.expert import MAX_SEQ_LEN

Weight = Annotated[float, Field(ge=0, le=1000)]


class DataConfig(Section):
    """What the experts read."""

    path: Path = Path("data")
    """A folder written by `pyper prepare`."""
    seq_len: int = Field(default=1024, ge=8, le=MAX_SEQ_LEN)
    """Tokens per training sequence."""
    loader_workers: int = Field(default=1, ge=0, le=64)
    """Threads that read ahead; the batches are the same for any number."""
    weights: dict[str, Weight] = Field(default_factory=dict)
    """How often an epoch sees a domain, by its name: `{ law = 2.0, novels = 0.5 }` reads law twice
    and a different half of the novels each time. 1.0 where a domain is not named."""


Column = Literal["text", "messages", "domain"]


def _parse_columns(value: object) -> object:
    """`text=body,domain=source`."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    for use, _, name in pairs:
        if use.strip() not in ("text", "messages", "domain") or not name.strip():
            raise ValueError(
                f"`{value}` is not of the form text=body,domain=source (of text, messages, domain)"
            )
    return {use.strip(): name.strip() for use, _, name in pairs}


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
    """The key (or column) that holds the text in `.jsonl`, tables and data sets."""
    columns: Annotated[dict[Column, str], BeforeValidator(_parse_columns)] = Field(
        default_factory=dict
    )
    """Which key or column is the text, the messages of a chat, the domain:
    `text=body,domain=source`. With dots into what is nested, and `|` between
    names of which the first that is there counts: `text=body|text,domain=meta.source`."""
    filter: tuple[str, ...] = ()
    """Only documents for which every expression holds: `chars > 200 and lang == 'en'`."""
    chat_template: Path | None = None
    """A Jinja template for records with `messages`; else the one beside the tokenizer, else
    a plain one."""
    strict_tokenizer: bool = False
    """Refuse a tokenizer that changes text, instead of warning of it."""
    shard_tokens: int = Field(default=100_000_000, ge=1024)
    workers: int = Field(default=0, ge=0, le=1024)
    """Threads that tokenize, 0 for one per core; the output is the same for any number."""
