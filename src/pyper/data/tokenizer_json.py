"""A `tokenizer.json` that anybody wrote. Where the library fails, it is one error of ours."""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from tokenizers import Tokenizer

from pyper.errors import TokenizerError

MAX_ENTRIES = 1 << 24
"""Sixty times the largest vocabulary in use; the library makes a table up to the highest id."""


def parse_tokenizer(text: str, name: str, hint: str) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`; name: what errors call it. Raises TokenizerError."""
    with library_errors(f"{name} is not a tokenizer.json", hint):
        highest = _highest_id(json.loads(text))
        if highest < MAX_ENTRIES:
            return Tokenizer.from_str(text)
    raise TokenizerError(
        f"{name} has an entry with the id {highest:,}; at most {MAX_ENTRIES:,} entries are read",
        hint="number the entries of its `vocab` from 0",
    )


@contextmanager
def library_errors(what: str, hint: str) -> Iterator[None]:
    """TokenizerError for whatever the library raises."""
    try:
        yield
    except (TokenizerError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # bare Exceptions; a panic of Rust's is not even one of those
        raise TokenizerError(f"{what}: {error}", hint=hint) from error


def encoding_errors() -> AbstractContextManager[None]:
    """TokenizerError for a text that has no tokens: Unigram, WordPiece without an unknown one."""
    return library_errors(
        "the tokenizer cannot encode this text",
        hint="take one with an unknown token, or one that falls back to bytes",
    )


def _highest_id(values: object) -> int:
    """Of the model's entries; a list of them (Unigram) is numbered by its places."""
    model = values.get("model") if isinstance(values, dict) else None
    entries = model.get("vocab") if isinstance(model, dict) else None
    ids = entries.values() if isinstance(entries, dict) else ()
    return max((index for index in ids if isinstance(index, int)), default=-1)
