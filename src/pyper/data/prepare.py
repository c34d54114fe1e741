"""Text to a data folder: de-duplicated, split, tokenized, in shards, with a manifest."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyper.config import PrepareConfig
from pyper.data.alike_names import refuse_alike
from pyper.data.chat_template import TEMPLATE_FILE
from pyper.data.chats import Chats
from pyper.data.counts import ReadCounts, say_count
from pyper.data.digest_set import DigestSet
from pyper.data.manifest import (
    MANIFEST,
    TOKENIZER,
    DataManifest,
    SourceEntry,
    SplitEntry,
    describe,
    read_manifest,
)
from pyper.data.partial_folder import partial_folder
from pyper.data.readers import Document, read_files
from pyper.data.round_trip import describe_changes
from pyper.data.sample import TextSample, add_sample, new_samples, trainable_part
from pyper.data.shard_writer import token_dtype
from pyper.data.shards import TokenData
from pyper.data.sources import SourceFile, Split, find_files
from pyper.data.split_writing import Progress, write_splits
from pyper.data.splitting import Digest, DomainPlan, digest_of, plan_domain
from pyper.data.tokenizer import TextTokenizer
from pyper.errors import DataError, TokenizerError

# Settings that came later: at their defaults they are not written down, as before there were any.
_LATER = ("columns", "filter", "chat_template", "strict_tokenizer", "workers")


def prepare(
    sources: Sequence[Path],
    output: Path,
    config: PrepareConfig,
    *,
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
) -> DataManifest:
    """Write the data folder `output`, in two passes over the text, and return its manifest.

    Exact duplicates are dropped over all domains and splits; held-out files are read first, so
    the training copy is the one that goes. The folder appears whole or not at all, and one with
    the same text and settings is returned as it is. See `read_documents` for the sources. Memory
    does not grow with the text, but for 21 to 32 bytes a document by which duplicates are found,
    and 16 for where it starts in its shard; a file of plain text is held whole. `warn` is told when
    a tokenizer changes text.

    Raises DataError for sources without text, a domain without training text, domains whose names
    the file system takes for one, a filter that cannot be used or keeps nothing, and an `output`
    that holds something else; TokenizerError, for one
    that changes text under `strict_tokenizer`; StorageError when `output` cannot be written.
    """
    files, skipped = find_files(sources)
    _refuse_nesting(sources, output)
    if "domain" not in config.columns:
        refuse_alike((f.domain for f in files), output)
    loaded = _load_tokenizer(config)
    chats = Chats(config, loaded)
    settings = _settings(config, loaded, chats)
    entries = [
        SourceEntry(name=f.name, domain=f.domain, split=f.split, sha256=f.sha256()) for f in files
    ]
    finished = _finished(output, settings, entries)
    if finished is not None:
        return finished
    counts = ReadCounts(skipped_files=skipped)
    documents = _Unique(files, config, chats)
    plans, samples = _scan(documents, output, counts, progress)
    tokenizer = loaded or _train_tokenizer(plans, samples, config)
    if config.tokenizer not in ("bpe", "bytes"):
        _check_round_trip(tokenizer, plans, samples, config, warn)
    with partial_folder(output) as folder:
        tokenizer.save(folder / TOKENIZER)
        template = None
        if counts.chats:
            (folder / TEMPLATE_FILE).write_text(chats.source, encoding="utf-8")
            template = describe(folder / TEMPLATE_FILE, folder)
        else:
            settings.pop("chat_template", None)
        again = documents.read(ReadCounts())
        splits = write_splits(folder, again, plans, tokenizer, config.shard_tokens, progress)
        _check_training_text(splits, counts)
        manifest = DataManifest(
            tokenizer_fingerprint=tokenizer.fingerprint,
            tokenizer_file=describe(folder / TOKENIZER, folder),
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            chat_template_file=template,
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


Settings = dict[str, str | int | float]


def _settings(config: PrepareConfig, loaded: TextTokenizer | None, chats: Chats) -> Settings:
    settings: Settings = config.model_dump(exclude=set(_LATER))
    if config.columns:
        settings["columns"] = ",".join(f"{k}={v}" for k, v in sorted(config.columns.items()))
    if config.filter:
        settings["filter"] = "\n".join(config.filter)
    # Dropped again where no chats are found: whether there are any is known when all was read.
    settings["chat_template"] = hashlib.sha256(chats.source.encode()).hexdigest()
    if loaded is not None:
        # What it is, not where it was: the folder means the same on another machine.
        settings |= {"tokenizer": loaded.fingerprint, "vocab_size": loaded.vocab_size}
    return settings


def _finished(output: Path, settings: Settings, sources: list[SourceEntry]) -> DataManifest | None:
    """The manifest of an equal, complete folder; None when there is nothing yet."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    hint = "choose another output folder, or remove this one"
    if not (output / MANIFEST).is_file():
        raise DataError(f"`{output}` exists and is no data folder", hint=hint)
    manifest = read_manifest(output)
    if manifest.chat_template_file is None:
        settings = {k: v for k, v in settings.items() if k != "chat_template"}
    keys = [*settings, *(key for key in _LATER if key in manifest.settings)]
    changed = [k for k in dict.fromkeys(keys) if manifest.settings.get(k) != settings.get(k)]
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


@dataclass(frozen=True, slots=True)
class _Unique:
    """The documents of all files without duplicates, to be read as often as needed."""

    files: Sequence[SourceFile]
    config: PrepareConfig
    chats: Chats

    def read(self, counts: ReadCounts) -> Iterator[tuple[Document, Digest]]:
        seen = DigestSet()
        for document in read_files(self.files, self.config, counts, self.chats):
            digest = digest_of(document.text)
            if seen.add(digest.raw):
                yield document, digest
            else:
                counts.documents -= 1
                counts.duplicates += 1


def _scan(
    documents: _Unique, output: Path, counts: ReadCounts, progress: Progress | None
) -> tuple[dict[str, DomainPlan], dict[str, TextSample]]:
    """The first pass: how each domain is split, and text for the tokenizer."""
    files, config = documents.files, documents.config
    plans: dict[str, DomainPlan] = {}
    if "domain" not in config.columns:
        for name in sorted({file.domain for file in files}):
            given = {file.split for file in files if file.domain == name}
            plans[name] = plan_domain(given, config)
    samples = new_samples(plans)
    for document, digest in documents.read(counts):
        plan = plans.get(document.domain)
        if plan is None:  # a column names it
            refuse_alike([*plans, document.domain], output)
            plan = plans[document.domain] = plan_domain(set(), config)
            add_sample(samples, document.domain)
        plan.observe(document, digest)
        if document.split not in ("valid", "test"):
            text = document.text
            if document.answers is None:
                text = trainable_part(text, plan)
            samples[document.domain].add(text, digest)
        if progress is not None:
            progress("read", counts.documents)
    _refuse_empty(plans, counts)
    return dict(sorted(plans.items())), samples


def _refuse_empty(plans: dict[str, DomainPlan], counts: ReadCounts) -> None:
    if counts.documents == 0 and any(counts.filtered.values()):
        told = ", ".join(f"`{source}` {n:,}" for source, n in counts.filtered.items() if n)
        raise DataError(
            f"the filters leave no document; they removed: {told}",
            hint="loosen them, or try them on a few lines first",
        )
    for name, plan in plans.items():
        if plan.documents == 0:
            raise _empty(f"the domain `{name}` has no documents", counts)


def _check_round_trip(
    tokenizer: TextTokenizer,
    plans: dict[str, DomainPlan],
    samples: dict[str, TextSample],
    config: PrepareConfig,
    warn: Callable[[str], None] | None,
) -> None:
    texts = (text for name, plan in plans.items() for text in samples[name].texts(plan))
    changes = describe_changes(tokenizer, texts)
    if changes and config.strict_tokenizer:
        raise TokenizerError(
            changes,
            hint=f"{config.tokenizer} cannot write such text; use another tokenizer, or allow it "
            "by leaving out `--strict-tokenizer`",
        )
    if changes and warn is not None:
        warn(changes)


def _train_tokenizer(
    plans: dict[str, DomainPlan], samples: dict[str, TextSample], config: PrepareConfig
) -> TextTokenizer:
    texts = (text for name, plan in plans.items() for text in samples[name].texts(plan))
    return TextTokenizer.train_bpe(texts, config.vocab_size)


def _check_training_text(splits: dict[str, dict[Split, SplitEntry]], counts: ReadCounts) -> None:
    for name, entries in splits.items():
        if entries["train"].tokens == 0:
            raise _empty(f"the domain `{name}` has no text to train on", counts)


def _empty(message: str, counts: ReadCounts) -> DataError:
    seen = ", ".join(f"{n:,} {say_count(name)}" for name, n in counts.as_dict().items() if n)
    return DataError(
        f"{message} ({seen} in all)", hint="add text to it, or leave it out of the sources"
    )
