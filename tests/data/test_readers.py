import gzip
import json
import lzma
import os
import sys
from pathlib import Path

import pytest

from pyper.config import PrepareConfig
from pyper.data import Document, ReadCounts, read_documents
from pyper.data.sources import find_files
from pyper.errors import DataError, MissingExtraError


def read(*sources: Path, **settings: object) -> tuple[list[Document], ReadCounts]:
    counts = ReadCounts()
    config = PrepareConfig.model_validate(settings)
    return list(read_documents(list(sources), config, counts)), counts


def texts(*sources: Path, **settings: object) -> list[str]:
    return [document.text for document in read(*sources, **settings)[0]]


def test_each_folder_and_file_is_a_domain(tmp_path: Path) -> None:
    (tmp_path / "law" / "old").mkdir(parents=True)
    (tmp_path / "law" / "b.txt").write_text("b")
    (tmp_path / "law" / "old" / "a.md").write_text("a")
    (tmp_path / "novels.jsonl").write_text('{"text": "n"}\n')
    (tmp_path / ".hidden.txt").write_text("h")
    found = [(d.domain, d.text, d.split) for d in read(tmp_path)[0]]
    assert found == [("law", "b", None), ("law", "a", None), ("novels", "n", None)]


def test_held_out_files_are_read_before_training_files(tmp_path: Path) -> None:
    for name in ("train", "validation", "test"):
        (tmp_path / "law").mkdir(exist_ok=True)
        (tmp_path / "law" / f"{name}.txt").write_text(name)
    found = [(d.domain, d.text, d.split) for d in read(tmp_path)[0]]
    assert found == [
        ("law", "test", "test"),
        ("law", "validation", "valid"),
        ("law", "train", "train"),
    ]


@pytest.mark.parametrize("names", [("train.txt", "dev.txt"), ("train-00000-of-00002.txt",)])
def test_a_folder_of_splits_is_one_domain(tmp_path: Path, names: tuple[str, ...]) -> None:
    (tmp_path / "README.md").write_text("not data")
    for name in names:
        (tmp_path / name).write_text(name)
    documents = read(tmp_path)[0]
    assert {d.domain for d in documents} == {tmp_path.name}
    assert {d.text for d in documents} == set(names)


def test_a_test_folder_inside_source_code_is_code(tmp_path: Path) -> None:
    (tmp_path / "python" / "test").mkdir(parents=True)
    (tmp_path / "python" / "test" / "case.py").write_text("assert 1")
    (tmp_path / "python" / "main.py").write_text("print(1)")
    assert [d.split for d in read(tmp_path)[0]] == [None, None]


def test_a_file_given_twice_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a")
    assert texts(path, tmp_path) == ["a"]


def test_links_to_a_parent_folder_end(tmp_path: Path) -> None:
    (tmp_path / "law").mkdir()
    (tmp_path / "law" / "a.txt").write_text("a")
    for name in "xyz":  # one alone ends at the system's limit; three would take for ever
        (tmp_path / "law" / name).symlink_to(tmp_path)
    assert texts(tmp_path) == ["a"]


def test_compressed_files_are_read(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    line = json.dumps({"text": "é"}).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line))
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress("é".encode()))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(line))
    assert texts(tmp_path) == ["é", "é", "é"]
    assert [d.domain for d in read(tmp_path)[0]] == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst"])
def test_a_damaged_archive_is_named(tmp_path: Path, name: str) -> None:
    if name.endswith("zst"):
        pytest.importorskip("zstandard")
    (tmp_path / name).write_bytes(b"\x1f\x8b this is no archive")
    with pytest.raises(DataError, match=name):
        read(tmp_path)


def test_parquet_is_read_from_the_text_column(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": ["one", None, "two"]}), tmp_path / "a.parquet")
    assert texts(tmp_path, text_key="body") == ["one", "two"]
    with pytest.raises(DataError, match="`body`"):
        read(tmp_path)


def test_what_is_mended_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\0 \xff")
    documents, counts = read(tmp_path)
    assert documents[0].text == "one\ntwo �"
    assert (counts.bad_utf8, counts.nul_bytes, counts.byte_order_marks) == (1, 1, 1)


def test_a_byte_order_mark_does_not_cost_the_first_json_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}\n')
    documents, counts = read(tmp_path)
    assert [d.text for d in documents] == ["one", "two"]
    assert (counts.byte_order_marks, counts.malformed_lines) == (1, 0)


def test_a_readme_beside_domains_is_no_domain(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "law.txt").write_text("law")
    assert [d.domain for d in read(tmp_path)[0]] == ["law"]


def test_utf16_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("wörd".encode("utf-16"))
    assert texts(tmp_path) == ["wörd"]


def test_half_a_character_in_json_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d"}')
    documents, counts = read(tmp_path)
    assert (documents[0].text, counts.bad_utf8) == ("a�", 1)


def test_empty_and_short_documents_are_left_out(tmp_path: Path) -> None:
    lines = [{"text": ""}, {"text": " \n"}, {"text": None}, {"text": "ab"}, {"text": "abcd"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    documents, counts = read(tmp_path, min_chars=3)
    assert [d.text for d in documents] == ["abcd"]
    assert (counts.empty, counts.too_short, counts.documents) == (3, 1, 1)


def test_malformed_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    lines = ['{"text": "one"}', "{", "[1]", '{"other": 1}', '{"text": 3}', "", '{"text": "two"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    documents, counts = read(tmp_path)
    assert [(d.text, d.source) for d in documents] == [("one", "a.jsonl:1"), ("two", "a.jsonl:7")]
    assert counts.malformed_lines == 4


def test_a_file_with_no_good_line_is_refused_with_the_first_bad_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\nplain text\nmore\n")
    with pytest.raises(DataError, match="line is 2"):
        read(tmp_path)


def test_a_missing_key_is_answered_with_the_keys_there(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x", "id": 1}')
    with pytest.raises(DataError, match="`body`, `id`"):
        read(tmp_path)


def test_a_list_of_records_in_json_is_read_by_the_record(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": "one"}, 3, {"text": "two"}], indent=1))
    with gzip.open(tmp_path / "b.json.gz", "wt") as stream:
        json.dump([{"text": "three"}], stream)
    counts = ReadCounts()
    found = [(d.text, d.source) for d in read_documents([tmp_path], PrepareConfig(), counts)]
    assert found == [("one", "a.json:0"), ("two", "a.json:2"), ("three", "b.json.gz:0")]
    assert counts.malformed_lines == 1


@pytest.mark.parametrize("content", ['{"text": "one"}', '[{"id": 1}]', "[1, 2]", "[]", "[{"])
def test_any_other_json_is_text(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    assert [d.text for d in read_documents([tmp_path], PrepareConfig(), ReadCounts())] == [content]


def test_blank_lines_cut_when_asked(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\none\r\ntwo\r\n \r\n\r\nthree\n")
    assert texts(tmp_path, split_by="blank-line") == ["one\ntwo", "three"]
    assert len(texts(tmp_path, split_by="document")) == 1


def test_a_very_long_line_of_spaces_is_no_trouble(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\n" + " " * 3_000_000 + "b")
    assert len(texts(tmp_path, split_by="blank-line")) == 1


def test_files_that_are_not_text_are_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(range(256)))
    (tmp_path / "notes").write_text("text without an extension")
    documents, counts = read(tmp_path)
    assert [d.domain for d in documents] == ["notes"]
    assert counts.skipped_files == 1


def test_a_missing_source_gets_a_suggestion(tmp_path: Path) -> None:
    (tmp_path / "novels").mkdir()
    with pytest.raises(DataError) as caught:
        read(tmp_path / "novel")
    assert "novels" in caught.value.hint


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="neither a file nor a folder") as caught:
        list(read_documents([tmp_path / "pipe"], PrepareConfig(), ReadCounts()))
    assert "twice" in caught.value.hint


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "package"), [("a.txt.zst", "zstandard"), ("a.parquet", "pyarrow")]
)
def test_an_optional_package_is_named_when_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=package) as caught:
        read(tmp_path)
    assert "pyper[data]" in caught.value.hint


def test_of_several_folders_each_is_one_domain(tmp_path: Path) -> None:
    for domain in ("novels", "law"):
        (tmp_path / domain).mkdir()
        for name in ("one.txt", "two.txt"):
            (tmp_path / domain / name).write_text(f"{domain} {name}")
    together, _ = find_files([tmp_path / "novels", tmp_path / "law"])
    assert {(f.domain, f.path.name) for f in together} == {
        (domain, name) for domain in ("novels", "law") for name in ("one.txt", "two.txt")
    }
    alone, _ = find_files([tmp_path / "novels"])
    assert {f.domain for f in alone} == {"one", "two"}
