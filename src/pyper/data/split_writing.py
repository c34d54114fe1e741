"""The second pass over the text: tokens of every split of every domain, in shards."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pyper.data.manifest import SplitEntry
from pyper.data.readers import Document
from pyper.data.shard_writer import BUFFER_BYTES, ShardWriter, token_dtype
from pyper.data.sources import SPLITS, Split
from pyper.data.special_tokens import Span
from pyper.data.splitting import Digest, DomainPlan
from pyper.data.tokenizer import TextTokenizer
from pyper.data.weighing import Encoded, encode_documents

Progress = Callable[[str, int], None]
"""Called with the stage (`read` or `write`) and the documents done in it so far."""

_BATCH_CHARS = 2_000_000
"""Text tokenized at once: enough for all cores, little enough to stay in the caches."""
_BUFFERS_BYTES = 64 << 20
"""Of all shards that are being written, together."""


def write_splits(
    folder: Path,
    documents: Iterable[tuple[Document, Digest]],
    plans: dict[str, DomainPlan],
    tokenizer: TextTokenizer,
    shard_tokens: int,
    progress: Progress | None,
) -> dict[str, dict[Split, SplitEntry]]:
    """Write what `plans`, by domain, make of documents; what each split holds.

    shard_tokens: in one file, at most. Raises OSError from the disk.
    """
    buffer_bytes = min(BUFFER_BYTES, _BUFFERS_BYTES // (len(plans) * len(SPLITS)))
    writers = {
        (name, split): ShardWriter(
            folder,
            split,
            name,
            dtype=token_dtype(tokenizer.vocab_size),
            bos_id=tokenizer.bos_id,
            shard_tokens=shard_tokens,
            buffer_bytes=buffer_bytes,
        )
        for name in plans
        for split in SPLITS
    }
    done = 0
    for batch, encoded in _encoded(_batches(documents, plans), tokenizer):
        for part, (tokens, weights) in zip(batch, encoded, strict=True):
            writers[part.domain, part.split].add(tokens, len(part.text.encode()), weights)
        done += len(batch)
        if progress is not None:
            progress("write", done)
    return {name: {split: writers[name, split].close() for split in SPLITS} for name in plans}


class _Part(NamedTuple):
    """A document, or the part of one that is in a split."""

    domain: str
    split: Split
    text: str
    answers: Sequence[Span] | None
    typed: Sequence[Span]


def _batches(
    documents: Iterable[tuple[Document, Digest]], plans: dict[str, DomainPlan]
) -> Iterator[list[_Part]]:
    batch: list[_Part] = []
    chars = 0
    for document, digest in documents:
        for split, text in plans[document.domain].assign(document, digest):
            batch.append(_Part(document.domain, split, text, document.answers, document.typed))
            chars += len(text)
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _encoded(
    batches: Iterator[list[_Part]], tokenizer: TextTokenizer
) -> Iterator[tuple[list[_Part], list[Encoded]]]:
    for batch in batches:
        yield batch, encode_documents(tokenizer, [part[2:] for part in batch])
