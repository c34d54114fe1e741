"""Text to a data folder: de-duplicated, split, tokenized, in shards, with a manifest."""

import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pyper.config import PrepareConfig
from pyper.data.manifest import (
    MANIFEST,
    TOKENIZER,
    DataManifest,
    SourceEntry,
    SplitEntry,
    describe,
    read_manifest,
)
from pyper.data.readers import Document, ReadCounts, read_files
from pyper.data.sample import TextSample, new_samples, trainable_part
from pyper.data.shards import ShardWriter, TokenData, token_dtype
from pyper.data.sources import SPLITS, SourceFile, Split, find_files
from pyper.data.splitting import Digest, DomainPlan, digest_of, plan_domain
from pyper.data.tokenizer import TextTokenizer
from pyper.errors import DataError, StorageError

Progress = Callable[[str, int], None]
"""Called with the stage (`read` or `write`) and the documents done in it so far."""

_BATCH_CHARS = 2_000_000
"""Text tokenized at once: enough for all cores, little enough to stay in the caches."""


def prepare(
    sources: Sequence[Path],
    output: Path,
    config: PrepareConfig,
    *,
    progress: Progress | None = None,
) -> DataManifest:
    """Write the data folder `output`, in two passes over the text, and return its manifest.

    Exact duplicates are dropped over all domains and splits; held-out files are read first, so
    the training copy is the one that goes. The folder appears whole or not at all, and one with
    the same text and settings is returned as it is. See `read_documents` for the sources.

    Raises DataError for sources without text, a domain without training text, and an `output` that
    holds something else; TokenizerError; StorageError when `output` cannot be written.
    """
    files, skipped = find_files(sources)
    _refuse_nesting(sources, output)
    loaded = _load_tokenizer(config)
    settings = _settings(config, loaded)
    entries = [
        SourceEntry(name=f.name, domain=f.domain, split=f.split, sha256=f.sha256()) for f in files
    ]
    finished = _finished(output, settings, entries)
    if finished is not None:
        return finished
    counts = ReadCounts(skipped_files=skipped)
    plans, samples = _scan(files, config, counts, progress)
    tokenizer = loaded or _train_tokenizer(plans, samples, config)
    with _partial_folder(output) as folder:
        tokenizer.save(folder / TOKENIZER)
        splits = _write(folder, files, config, plans, tokenizer, progress)
        _check_training_text(splits, counts)
        manifest = DataManifest(
            tokenizer_fingerprint=tokenizer.fingerprint,
            tokenizer_file=describe(folder / TOKENIZER, folder),
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            dtype=token_dtype(tokenizer.vocab_size),
            domains=splits,
            counts=counts.as_dict(),
            settings=settings,
            sources=entries,
        )
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    return manifest


def _load_tokenizer(config: PrepareConfig) -> TextTokenizer | None:
    if config.tokenizer == "bpe":
        return None
    if config.tokenizer == "bytes":
        return TextTokenizer.bytes_only()
    return TextTokenizer.load(Path(config.tokenizer))


def _settings(config: PrepareConfig, loaded: TextTokenizer | None) -> dict[str, str | int | float]:
    settings: dict[str, str | int | float] = config.model_dump()
    if loaded is not None:
        # What it is, not where it was: the folder means the same on another machine.
        settings |= {"tokenizer": loaded.fingerprint, "vocab_size": loaded.vocab_size}
    return settings


def _finished(
    output: Path, settings: dict[str, str | int | float], sources: list[SourceEntry]
) -> DataManifest | None:
    """The manifest of an equal, complete folder; None when there is nothing yet."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    hint = "choose another output folder, or remove this one"
    if not (output / MANIFEST).is_file():
        raise DataError(f"`{output}` exists and is no data folder", hint=hint)
    manifest = read_manifest(output)
    changed = [key for key, value in settings.items() if manifest.settings.get(key) != value]
    if manifest.sources != sources:
        changed.append("the text")
    if changed:
        raise DataError(
            f"`{output}` was prepared differently: {', '.join(changed)} changed", hint=hint
        )
    return TokenData.open(output).manifest


def _refuse_nesting(sources: Sequence[Path], output: Path) -> None:
    for source in sources:
        if output.resolve().is_relative_to(source.resolve()):
            raise DataError(
                f"the output `{output}` is inside the source `{source}`",
                hint="choose a folder outside, or its shards would be read as text next time",
            )


def _unique(
    files: Sequence[SourceFile], config: PrepareConfig, counts: ReadCounts
) -> Iterator[tuple[Document, Digest]]:
    seen: set[bytes] = set()
    for document in read_files(files, config, counts):
        digest = digest_of(document.text)
        if digest.raw in seen:
            counts.documents -= 1
            counts.duplicates += 1
            continue
        seen.add(digest.raw)
        yield document, digest


def _scan(
    files: Sequence[SourceFile],
    config: PrepareConfig,
    counts: ReadCounts,
    progress: Progress | None,
) -> tuple[dict[str, DomainPlan], dict[str, TextSample]]:
    """The first pass: how each domain is split, and text for the tokenizer."""
    domains = sorted({file.domain for file in files})
    given = {name: {f.split for f in files if f.domain == name} for name in domains}
    plans = {name: plan_domain(given[name], config) for name in domains}
    samples = new_samples(plans)
    for document, digest in _unique(files, config, counts):
        plan = plans[document.domain]
        plan.observe(document, digest)
        if document.split not in ("valid", "test"):
            samples[document.domain].add(trainable_part(document.text, plan), digest)
        if progress is not None:
            progress("read", counts.documents)
    for name, plan in plans.items():
        if plan.documents == 0:
            raise _empty(f"the domain `{name}` has no documents", counts)
    return plans, samples


def _train_tokenizer(
    plans: dict[str, DomainPlan], samples: dict[str, TextSample], config: PrepareConfig
) -> TextTokenizer:
    texts = (text for name, plan in plans.items() for text in samples[name].texts(plan))
    return TextTokenizer.train_bpe(texts, config.vocab_size)


def _write(
    folder: Path,
    files: Sequence[SourceFile],
    config: PrepareConfig,
    plans: dict[str, DomainPlan],
    tokenizer: TextTokenizer,
    progress: Progress | None,
) -> dict[str, dict[Split, SplitEntry]]:
    """The second pass: tokens of every split of every domain."""
    writers = {
        (name, split): ShardWriter(
            folder,
            split,
            name,
            dtype=token_dtype(tokenizer.vocab_size),
            bos_id=tokenizer.bos_id,
            shard_tokens=config.shard_tokens,
        )
        for name in plans
        for split in SPLITS
    }
    done = 0
    for batch in _batches(files, config, plans):
        encoded = tokenizer.encode_batch([text for _, _, text in batch])
        for (domain, split, text), tokens in zip(batch, encoded, strict=True):
            writers[domain, split].add(tokens, len(text.encode()))
        done += len(batch)
        if progress is not None:
            progress("write", done)
    return {name: {split: writers[name, split].close() for split in SPLITS} for name in plans}


def _batches(
    files: Sequence[SourceFile], config: PrepareConfig, plans: dict[str, DomainPlan]
) -> Iterator[list[tuple[str, Split, str]]]:
    batch: list[tuple[str, Split, str]] = []
    chars = 0
    for document, digest in _unique(files, config, ReadCounts()):
        for split, text in plans[document.domain].assign(document, digest):
            batch.append((document.domain, split, text))
            chars += len(text)
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _check_training_text(splits: dict[str, dict[Split, SplitEntry]], counts: ReadCounts) -> None:
    for name, entries in splits.items():
        if entries["train"].tokens == 0:
            raise _empty(f"the domain `{name}` has no text to train on", counts)


def _empty(message: str, counts: ReadCounts) -> DataError:
    seen = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in counts.as_dict().items() if n)
    return DataError(
        f"{message} ({seen} in all)", hint="add text to it, or leave it out of the sources"
    )


@contextmanager
def _partial_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its name when all went well, and else is removed."""
    prefix = f".{output.name}.partial-{socket.gethostname()}-"
    folder = output.parent / f"{prefix}{os.getpid()}"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(output.parent, prefix)
        folder.mkdir()
        yield folder
        if output.is_dir():
            output.rmdir()  # empty, as `_finished` found
        folder.rename(output)
    except OSError as error:  # the readers turn theirs into a DataError
        raise StorageError(
            f"cannot write {output}: {error.strerror or error}",
            hint="free some space, or choose a folder you may write to",
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove what killed runs on this machine left behind."""
    if os.name != "posix":  # elsewhere signal 0 would end the process
        return
    for folder in parent.glob(f"{prefix}*"):
        try:
            os.kill(int(folder.name.removeprefix(prefix)), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (ValueError, PermissionError):
            continue
