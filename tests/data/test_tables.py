"""Rows of CSV, Arrow, Feather and of what `datasets` saved."""

import csv
import gzip
import io
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyper.config import PrepareConfig
from pyper.data import Document, ReadCounts, TokenData, prepare, read_documents
from pyper.data.tables import read_csv
from pyper.errors import DataError, MissingExtraError

pyarrow = pytest.importorskip("pyarrow")
pyarrow_csv = pytest.importorskip("pyarrow.csv")
feather = pytest.importorskip("pyarrow.feather")
parquet = pytest.importorskip("pyarrow.parquet")
datasets = pytest.importorskip("datasets")


def read(*sources: Path, **settings: Any) -> tuple[list[Document], ReadCounts]:
    counts = ReadCounts()
    config = PrepareConfig.model_validate(settings)
    return list(read_documents(list(sources), config, counts)), counts


def texts(*sources: Path, **settings: Any) -> list[str]:
    return [document.text for document in read(*sources, **settings)[0]]


fields = st.text(st.sampled_from(list('ab",;\n\r\t é☃')), max_size=12)
tables = st.integers(1, 4).flatmap(
    lambda n: st.lists(st.lists(fields, min_size=n, max_size=n), max_size=6)
)


@given(tables, st.booleans(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_csv_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], tabs: bool, mark: bool
) -> None:
    """Quotes, separators and line ends inside fields; with and without a byte order mark."""
    path = tmp_path_factory.mktemp("csv") / ("a.tsv" if tabs else "a.csv")
    header = [f"c{i}" for i in range(len(rows[0]) if rows else 1)]
    with path.open("w", newline="", encoding="utf-8-sig" if mark else "utf-8") as stream:
        writer = csv.writer(stream, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_ALL)
        writer.writerows([header, *rows])
    expected = [dict(zip(header, row, strict=True)) for row in rows]
    assert [record for record, _ in read_csv(path)] == expected


def test_a_csv_is_read_as_pyarrow_reads_it(tmp_path: Path) -> None:
    content = 'id,text\r\n1,"a ""quoted"" word, and\r\na line"\r\n2,\r\n3,plain é\r\n'
    (tmp_path / "a.csv").write_bytes(content.encode())
    options = pyarrow_csv.ParseOptions(newlines_in_values=True)
    table = pyarrow_csv.read_csv(io.BytesIO(content.encode()), parse_options=options)
    expected = [text.replace("\r\n", "\n") for text in table["text"].to_pylist()]
    assert texts(tmp_path / "a.csv") == [text for text in expected if text]


def test_places_are_lines_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text\none\n"two\nlines"\n\nthree\n')
    documents, _ = read(tmp_path / "a.csv")
    assert [d.source for d in documents] == ["a.csv:2", "a.csv:3", "a.csv:6"]


def test_a_field_may_be_a_book(tmp_path: Path) -> None:
    book = "word " * 200_000
    (tmp_path / "a.csv").write_text(f'text\n"{book}"\n')
    assert texts(tmp_path) == [book]


def test_semicolons_and_compression_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress("id;text\n1;über, all\n".encode()))
    assert texts(tmp_path) == ["über, all"]


def test_bytes_that_are_no_utf8_and_utf16_are_read_as_in_other_files(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text\nbad \xff\xfe byte\n")
    documents, counts = read(tmp_path / "a.csv")
    assert (documents[0].text, counts.bad_utf8) == ("bad �� byte", 1)
    (tmp_path / "b.csv").write_bytes("text\nwörd\n".encode("utf-16"))
    assert texts(tmp_path / "b.csv") == ["wörd"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text\none,two\n", r"a\.csv, line 2: 2 fields, but the header has 1"),
        ('id,text\n1,"never closed\n', r"a\.csv, line 2: unexpected end"),
        ('text\n"a"b\n', r"a\.csv, line 2:"),
        ("text,text\n1,2\n", "two columns called `text`"),
        ("id,body\n1,2\n", r"a\.csv:2 has no key `text`; keys there: `id`, `body`"),
    ],
)
def test_a_broken_table_is_refused_by_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_a_short_row_lacks_its_last_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,lang\none,en\ntwo\n")
    assert texts(tmp_path, filter=("lang == 'en'",)) == ["one"]


def test_columns_name_the_text_and_the_domain(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("body,source\none,law\ntwo,novels/old\nthree,\n")
    documents, _ = read(tmp_path, columns="text=body,domain=source")
    assert [(d.text, d.domain) for d in documents] == [
        ("one", "law"),
        ("two", "novels_old"),
        ("three", "a"),
    ]


@pytest.mark.parametrize(
    "value", ["../../etc", "/", "..", ".hidden", "a\0b", "x" * 500, "漢" * 90, "\n"]
)
def test_a_domain_from_a_column_is_a_harmless_file_name(tmp_path: Path, value: str) -> None:
    table = pyarrow.table({"text": [f"{i} text" for i in range(40)], "d": [value] * 40})
    feather.write_feather(table, tmp_path / "a.feather")
    config = PrepareConfig.model_validate({"tokenizer": "bytes", "columns": "domain=d"})
    prepare([tmp_path / "a.feather"], tmp_path / "deep" / "out", config)
    assert {p.name for p in (tmp_path / "deep").iterdir()} == {"out"}
    [domain] = TokenData.open(tmp_path / "deep" / "out", verify=True).domains
    assert domain
    assert "/" not in domain
    assert not domain.startswith(".")


def test_nested_keys_and_alternatives(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"body": "one", "meta": {"set": "law"}}\n{"text": "two", "meta": null}\n'
    )
    documents, _ = read(tmp_path, columns="text=body|text,domain=meta.set")
    assert [(d.text, d.domain) for d in documents] == [("one", "law"), ("two", "a")]


def test_a_null_column_gives_way_to_what_the_row_has(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}]
    rows = {"body": [None, None, None, "four"], "text": ["one", None, None, "no"]}
    table = pyarrow.table({**rows, "messages": [None, chat, None, None]})
    parquet.write_table(table, tmp_path / "a.parquet")
    documents, counts = read(tmp_path, columns="text=body|text")
    assert [d.text.splitlines()[-1] for d in documents] == ["one", "there<|end|>", "four"]
    assert (counts.chats, counts.empty) == (1, 1)


def test_a_column_of_numbers_is_no_text(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has a text; the first bad row is 0") as caught:
        read(tmp_path)
    assert "must hold strings" in caught.value.hint


def test_a_column_of_addresses_is_no_domain(tmp_path: Path) -> None:
    rows = "".join(f"t{i},http://{i}\n" for i in range(1200))
    (tmp_path / "a.csv").write_text("text,url\n" + rows)
    with pytest.raises(DataError, match="`url` has more than 1,000 values"):
        read(tmp_path, columns="domain=url")


@pytest.mark.parametrize("columns", ["body", "text=", "colour=blue", "text"])
def test_columns_of_another_form_are_refused(columns: str) -> None:
    with pytest.raises(ValueError, match="text=body,domain=source"):
        PrepareConfig.model_validate({"columns": columns})


def write_arrow(path: Path, table: Any, *, stream: bool) -> None:
    opened = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with opened(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


@pytest.mark.parametrize("kind", ["stream", "file", "feather", "feather-lz4"])
def test_arrow_in_every_form_is_read(tmp_path: Path, kind: str) -> None:
    expected = [f"text {i}" for i in range(700)]
    table = pyarrow.table({"id": range(700), "text": expected})
    if kind.startswith("feather"):
        how = "lz4" if kind.endswith("lz4") else "uncompressed"
        feather.write_feather(table, tmp_path / "a.feather", compression=how)
    else:
        write_arrow(tmp_path / "a.arrow", table, stream=kind == "stream")
    documents, _ = read(tmp_path)
    assert [d.text for d in documents] == expected
    assert documents[-1].source.endswith(":699")
    with pytest.raises(DataError, match="`id`, `text`"):
        read(tmp_path, text_key="body")


@pytest.mark.parametrize("content", [b"", b"ARROW1 and no more", b"FEA1xxxx", b"\xff" * 100])
def test_a_damaged_arrow_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.arrow").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.arrow"):
        read(tmp_path)


def test_filters_reach_columns_that_are_not_text(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a", "b"], "odd name": [1, 2], "lang": ["en", "de"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert texts(tmp_path, filter=("lang == 'de'",)) == ["b"]
    assert texts(tmp_path, filter=("fields['odd name'] == 1",)) == ["a"]
    with pytest.raises(DataError, match="no record has") as caught:
        read(tmp_path, filter=("lagn == 'de'",))
    assert "lang" in caught.value.hint


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real folder of `save_to_disk`, shuffled and chosen from before it was saved."""
    folder = tmp_path_factory.mktemp("saved")
    rows = datasets.Dataset.from_dict({"text": [f"row {i}" for i in range(90)]})
    parts = {
        "train": rows.shuffle(seed=1).select(range(50)),
        "validation": rows.select(range(80, 90)),
        "unsupervised": rows.select(range(5)),
    }
    datasets.DatasetDict(parts).save_to_disk(str(folder / "corpus"))
    parts["train"].save_to_disk(str(folder / "alone"), num_shards=3)
    loaded = datasets.load_from_disk(str(folder / "alone"))
    loaded.map(lambda row: {"text": row["text"].upper()})  # leaves a cache in the folder
    assert list((folder / "alone").glob("cache-*.arrow"))
    return folder


def test_a_saved_data_set_is_one_domain_and_keeps_its_splits(saved: Path) -> None:
    documents, counts = read(saved / "corpus")
    expected = datasets.load_from_disk(str(saved / "corpus"))
    assert {d.domain for d in documents} == {"corpus"}
    for name, split in (("train", "train"), ("validation", "valid"), ("unsupervised", None)):
        own = [d.text for d in documents if d.split == split]
        assert own == list(expected[name]["text"])
    assert (counts.files, counts.skipped_files) == (3, 0)


def test_one_saved_split_in_several_files_is_read_without_its_caches(saved: Path) -> None:
    documents, _ = read(saved / "alone")
    expected = datasets.load_from_disk(str(saved / "alone"))
    assert [d.text for d in documents] == list(expected["text"])
    assert {d.domain for d in documents} == {"alone"}


def test_saved_data_sets_in_one_folder_are_domains(saved: Path) -> None:
    documents, _ = read(saved)
    assert {d.domain for d in documents} == {"alone", "corpus"}


@pytest.mark.parametrize(
    ("source", "package"), [("hf:owner/name", "datasets"), ("a.arrow", "pyarrow")]
)
def test_the_package_for_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, package: str
) -> None:
    (tmp_path / "a.arrow").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=package) as caught:
        read(Path(source))
    assert "pyper[data]" in caught.value.hint
