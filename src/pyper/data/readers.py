"""Files and folders to cleaned documents, counting all that was mended or left out."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyper.config import PrepareConfig
from pyper.data.chats import Chat, Chats, fault_of, read_messages
from pyper.data.cleaning import clean, decode
from pyper.data.counts import ReadCounts
from pyper.data.filters import Filter
from pyper.data.json_records import Records, read_jsonl, read_list
from pyper.data.sources import SourceFile, Split, find_files, open_binary, reading, short_name
from pyper.data.special_tokens import Span
from pyper.data.tables import Wanted, read_arrow, read_csv, read_parquet
from pyper.errors import DataError, PromptError

_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")
_UNSAFE = re.compile(r"[^\w.+@ -]+")
_MAX_DOMAINS = 1_000
_MAX_DOMAIN_CHARS = 80


@dataclass(frozen=True, slots=True)
class Document:
    """One text, its domain, the split its file was named after, and where it came from.

    answers: of a chat, the stretches of `text` to learn from; None where that is all of it.
    typed: of a chat, what spells special tokens and is none.
    """

    text: str
    domain: str
    split: Split | None
    source: str
    answers: tuple[Span, ...] | None = None
    typed: tuple[Span, ...] = ()


def read_documents(
    sources: Sequence[Path], config: PrepareConfig, counts: ReadCounts
) -> Iterator[Document]:
    """Documents of all sources in a fixed order: test files first, then valid, then train.

    That order lets de-duplication drop the training copy of a held-out document. At most one
    text file is held in memory; `.jsonl` and `.csv` are read by the line, `.parquet` and `.arrow`
    by the batch. Adds to `counts`. Raises DataError for a source that is missing, unreadable or has
    no text, and MissingExtraError for what needs a package that is not there.
    """
    files, skipped = find_files(sources)
    counts.skipped_files += skipped
    yield from read_files(files, config, counts)


def read_files(
    files: Iterable[SourceFile],
    config: PrepareConfig,
    counts: ReadCounts,
    chats: Chats | None = None,
) -> Iterator[Document]:
    """The documents of files already found; see `read_documents`."""
    reader = _Reader(config, counts, chats or Chats(config))
    for file in files:
        counts.files += 1
        yield from reader.read(file)
    for each in reader.filters:
        each.check_names()


class _Reader:
    """One pass over files: records to documents."""

    def __init__(self, config: PrepareConfig, counts: ReadCounts, chats: Chats) -> None:
        self._config, self._counts, self._chats = config, counts, chats
        self.filters = [Filter(source) for source in config.filter]
        counts.filtered = dict.fromkeys(config.filter, 0)
        self._text_keys = config.columns.get("text", config.text_key).split("|")
        self._domain_keys = [key for key in config.columns.get("domain", "").split("|") if key]
        self._domains: set[str] = set()

    def read(self, file: SourceFile) -> Iterator[Document]:
        """The documents of one file."""
        items = self._array_in(file)
        if file.kind == "text" and items is None:
            texts = _read_text(file.path, self._config, self._counts)
            found: Iterator[Document | None] = (
                self._keep(file, {}, Chat(text), place) for text, place in texts
            )
        else:
            found = self._read_records(file, self._records(file) if items is None else items)
        for document in found:
            if document is not None:
                self._counts.documents += 1
                yield document

    def _array_in(self, file: SourceFile) -> Records | None:
        """Of a `.json` that is a list of records with texts or messages, as chats are often
        published; None of any other file: it is text, or read by the record."""
        items = read_list(file.path) if file.kind == "text" else []
        first = items[0] if items else None
        if not isinstance(first, dict):
            return None
        if not (any(has(first, key) for key in self._text_keys) or self._chats.key_in(first)):
            return None
        records = (item if isinstance(item, dict) else None for item in items)
        return ((record, f":{number}") for number, record in enumerate(records))

    def _read_records(self, file: SourceFile, records: Records) -> Iterator[Document | None]:
        good, first_bad, refused = 0, "", False
        for record, place in records:
            where = f"{file.path}{place}"
            read = None if record is None else self._text_or_chat(record, where, strict=not good)
            if read is None or isinstance(read, PromptError):
                self._counts.malformed_lines += read is None
                self._counts.refused_chats += read is not None
                if not first_bad:
                    why = str(read or self._fault_of(record))
                    first_bad, refused = f"{place[1:]}{f': {why}' if why else ''}", bool(read)
                continue
            good += 1
            yield self._keep(file, record or {}, read, place)
        if first_bad and not good:
            raise _no_text(file, first_bad, refused=refused)

    def _records(self, file: SourceFile) -> Records:
        """Records with their places (`:12` is line or row 12); None for a line that is none."""
        if file.hub is not None:
            return file.hub.rows()
        if file.kind == "jsonl":
            return read_jsonl(file.path, self._counts)
        if file.kind == "csv":
            return iter(read_csv(file.path))
        read = read_parquet if file.kind == "parquet" else read_arrow
        return iter(read(file.path, self._wanted()))

    def _wanted(self) -> Wanted:
        """Columns that are asked for."""
        texts = [*_with_roots(self._text_keys), *self._chats.keys]
        names = [name for each in self.filters for name in each.fields]
        if any(each.asks_for_all for each in self.filters):
            names.append("")  # no column is called that: all are read
        return Wanted(texts, names, _with_roots(self._domain_keys))

    def _text_or_chat(
        self, record: Mapping[str, Any], where: str, *, strict: bool
    ) -> Chat | PromptError | None:
        """A text or a chat, None where there is neither, or why a template refuses.

        With `strict`, a record without the key is refused.
        """
        there = [key for key in self._text_keys if has(record, key)]
        # In a table every row has every column: what is null is not there, if something else is.
        key = next((k for k in there if look_up(record, k) is not None), next(iter(there), None))
        chat = self._chats.key_in(record)
        if chat is not None and (self._chats.is_named or not key or look_up(record, key) is None):
            return self._render(record[chat])
        if key is None:
            if strict:
                named = self._chats.keys if self._chats.is_named else ()
                raise _missing_key(where, "|".join([*self._text_keys, *named]), record)
            return None
        value = look_up(record, key)
        if value is not None and not isinstance(value, str):
            return None
        return Chat(clean(value or "", self._counts))

    def _render(self, value: list[Any]) -> Chat | PromptError | None:
        messages = read_messages(value)
        if messages is None:
            return None
        cleaned = [m | {"content": clean(m["content"], self._counts)} for m in messages]
        try:
            return self._chats.render(cleaned)
        except PromptError as error:
            return error

    def _fault_of(self, record: Mapping[str, Any] | None) -> str:
        """What is wrong with the messages of a record; nothing where it has none."""
        key = None if record is None else self._chats.key_in(record)
        return "" if record is None or key is None else fault_of(record[key])

    def _keep(
        self,
        file: SourceFile,
        record: Mapping[str, Any],
        read: Chat,
        place: str,
    ) -> Document | None:
        """The document, or None, counted, where it is left out."""
        counts, (text, answers, typed) = self._counts, read
        if not text or text.isspace():
            counts.empty += 1
            return None
        if len(text) < self._config.min_chars:
            counts.too_short += 1
            return None
        for each in self.filters:
            if not each.keeps(record, text, f"{file.path}{place}"):
                counts.filtered[each.source] += 1
                return None
        counts.chats += bool(answers)
        if answers == ():
            counts.chats_without_answers += 1
            return None
        domain = self._domain(record, file)
        return Document(text, domain, file.split, f"{file.name}{place}", answers, typed)

    def _domain(self, record: Mapping[str, Any], file: SourceFile) -> str:
        """The file's domain, or what a column says, as the name of a file."""
        found = (look_up(record, key) for key in self._domain_keys)
        value = next((value for value in found if value not in (None, "")), None)
        if value is None:
            return file.domain
        name = short_name(_UNSAFE.sub("_", str(value)[:_MAX_DOMAIN_CHARS])).strip(". ") or "_"
        self._domains.add(name)
        if len(self._domains) > _MAX_DOMAINS:
            key = "|".join(self._domain_keys)
            raise DataError(
                f"{file.path}: `{key}` has more than {_MAX_DOMAINS:,} values, like `{name}`: that "
                "is no domain",
                hint="name another one, `--columns domain=NAME`",
            )
        return name


def _with_roots(keys: Sequence[str]) -> list[str]:
    """Keys, and for `meta.source` also the column `meta`."""
    return [*keys, *(key.split(".")[0] for key in keys)]


def look_up(record: Mapping[str, Any], key: str) -> Any:
    """The value of a key, or of `meta.source` inside `meta`; None when there is none."""
    if key in record:
        return record[key]
    inside: Any = record
    for part in key.split("."):
        inside = inside.get(part) if isinstance(inside, Mapping) else None
    return inside


def has(record: Mapping[str, Any], key: str) -> bool:
    """Whether a record has the key, even if its value is null."""
    root, _, rest = key.rpartition(".")
    inside = look_up(record, root) if root else record
    return key in record or (isinstance(inside, Mapping) and rest in inside)


def _read_text(path: Path, config: PrepareConfig, counts: ReadCounts) -> Iterator[tuple[str, str]]:
    with reading(path), open_binary(path) as stream:
        data = stream.read()
    for text, place in _cut_text(decode(data, counts), config):
        yield clean(text, counts), place


def _cut_text(text: str, config: PrepareConfig) -> Iterator[tuple[str, str]]:
    if config.split_by != "blank-line":
        yield text, ""
        return
    parts = (part.strip("\n") for part in _BLANK_LINES.split(text.replace("\r\n", "\n")))
    yield from ((part, f":{i}") for i, part in enumerate(parts) if part)


def _no_text(file: SourceFile, first_bad: str, *, refused: bool) -> DataError:
    if refused:
        return DataError(
            f"the chat template can write no chat of {file.path}; the first is {first_bad}",
            hint="use another one with `--chat-template FILE`",
        )
    if file.kind == "jsonl":
        return DataError(
            f"no line of {file.path} is a JSON object with a text; the first bad line is "
            f"{first_bad}",
            hint='each line should read {"text": "..."} or {"messages": [...]}; give plain '
            "text the extension .txt",
        )
    return DataError(
        f"no row of {file.path} has a text; the first bad row is {first_bad}",
        hint="the column must hold strings, or messages with `role` and `content`; name another "
        "with `--columns text=NAME`",
    )


def _missing_key(where: str, key: str, there: Iterable[Any]) -> DataError:
    names = ", ".join(f"`{name}`" for name in list(there)[:12]) or "none"
    return DataError(
        f"{where} has no key `{key}`; keys there: {names}",
        hint="name the key that holds the text with `--text-key`, or the column with "
        "`--columns text=NAME`",
    )
