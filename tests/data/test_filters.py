"""Which documents stay, said in expressions that can do no more than that."""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyper.config import PrepareConfig
from pyper.data import ReadCounts, prepare, read_documents
from pyper.data.filters import MAX_CHARS, Filter
from pyper.data.text_measures import MEASURES
from pyper.errors import DataError

RECORD: dict[str, Any] = {
    "lang": "en",
    "score": 0.5,
    "n": 7,
    "meta": {"tags": ["a", "b"]},
    "no": None,
}
TEXT = "Two words\nand 3 More."


def keeps(source: str, record: dict[str, Any] = RECORD, text: str = TEXT) -> bool:
    return Filter(source).keeps(record, text, "file:1")


@pytest.mark.parametrize(
    "source",
    [
        "chars > 20 and words == 5 and lines == 2",
        "lang == 'en' or nonsense",
        "not (lang in ('de', 'fr'))",
        "lang in ['en']",
        "'wor' in text",
        "0.4 < score <= 0.5",
        "n % 2 == 1 and n // 2 == 3 and n * 2 + 1 - 1 == 14 and n / 2 == 3.5 and -n < 0",
        "fields['meta']['tags'][1] == 'b'",
        "meta['tags'][5] == None",
        "fields['absent'] == None and no == None",
        "len(meta['tags']) == 2 and max(n, 9) == 9 and abs(-1) == 1",
        "lower(text) != text and startswith(text, 'Two') and endswith(text, '.')",
        "count(text, 'o') == 3",
        "float('0.25') < score and int('6') < n and float('x') == None",
        "not (no > 3) and not (no <= 3) and not (no + 1 > 0) and not (-no < 0) and not ('a' in no)",
        "digit_share > 0 and alpha_share > 0.6 and longest_line == 11",
    ],
)
def test_what_holds_keeps_a_document_and_its_opposite_does_not(source: str) -> None:
    record = RECORD | {"nonsense": 1}
    assert keeps(source, record)
    assert not keeps(f"not ({source})", record)


numbers = st.integers(-100, 100)


@given(a=numbers, b=numbers, c=numbers)
def test_expressions_mean_what_they_mean_in_python(a: int, b: int, c: int) -> None:
    values = {"a": a, "b": b, "c": c}
    for source in ("a < b < c or a == b", "a * b - c > a + b and not c % 3 == 0", "a in (b, c)"):
        assert keeps(source, values) == bool(eval(source, {"__builtins__": {}}, values))


@pytest.mark.parametrize(
    "source",
    [
        "9**9**9 > 1",
        "'a' * 10**9 == text",
        "().__class__.__mro__",
        "text.upper() == 'A'",
        "__import__('os').system('true')",
        "open('/etc/passwd')",
        "(lambda: 1)()",
        "[x for x in text]",
        "{**fields}",
        "f'{text}'",
        "1 << 99",
        "text[0:5]",
        "len(*text)",
        "max(n, key=n)",
        "len()",
        "x := 3",
        "chars >",
        "",
        "import os",
        "b'bytes' == text",
        "1j == n",
        "...",
        "-" * 100 + "n",
        "(" * 300 + "1" + ")" * 300,
        "n + " * MAX_CHARS + "1",
    ],
)
def test_anything_else_is_refused_at_once(source: str) -> None:
    began = time.monotonic()
    with pytest.raises(DataError, match="cannot be used"):
        Filter(source)
    assert time.monotonic() - began < 0.5


@given(st.text("abn019'()[]+-*/%<>=., andornotinlenfieldstext", max_size=60))
def test_no_text_breaks_anything_but_by_a_dataerror(source: str) -> None:
    with suppress(DataError):
        keeps(source, {"n": 3, "a": "x", "b": None})


@pytest.mark.parametrize(
    "source", ["'a' * 1000 == text", "text + text == 'x'", "lang > 3", "n / 0"]
)
def test_what_makes_no_sense_of_a_record_names_the_place(source: str) -> None:
    with pytest.raises(DataError, match=r"file:1: the filter .* fails"):
        keeps(source)


def test_every_measure_is_a_number_for_any_text() -> None:
    for text in ("a", "", " ", "äÖ 1\n\n", "x" * 1000, "İ", "😀"):
        for name, measure in MEASURES.items():
            assert name == "text" or measure(text) >= 0  # type: ignore[operator]
            assert not name.endswith("share") or measure(text) <= 1  # type: ignore[operator]


@pytest.mark.parametrize(
    ("text", "share"), [("ab1!", 0.5), ("äb1!", 0.5), ("", 0), ("日本1", 2 / 3)]
)
def test_letters_of_any_alphabet_count(text: str, share: float) -> None:
    assert MEASURES["alpha_share"](text) == pytest.approx(share)


def test_lines_that_repeat_are_a_share() -> None:
    assert MEASURES["repeated_line_share"]("a\nb\na\n\na") == 0.5


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_what_is_left_out_is_counted_by_the_filter_that_did_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "x" * n, "n": n} for n in range(1, 11)])
    counts = ReadCounts()
    config = PrepareConfig(filter=("n > 3", "chars % 2 == 0"))
    found = list(read_documents([path], config, counts))
    assert [len(d.text) for d in found] == [4, 6, 8, 10]
    assert counts.filtered == {"n > 3": 3, "chars % 2 == 0": 3}
    manifest = prepare([path], tmp_path / "out", config.model_copy(update={"tokenizer": "bytes"}))
    assert manifest.counts["filter: n > 3"] == 3
    assert manifest.settings["filter"] == "n > 3\nchars % 2 == 0"


def test_a_filter_that_keeps_nothing_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "short"}])
    config = PrepareConfig(tokenizer="bytes", filter=("chars > 1000",))
    with pytest.raises(DataError, match="leave no document; they removed: `chars > 1000` 1"):
        prepare([path], tmp_path / "out", config)


def test_a_typing_error_gets_a_suggestion_before_much_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": f"{n}", "language": "en"} for n in range(500)])
    counts = ReadCounts()
    config = PrepareConfig(filter=("langauge == 'en'",))
    with pytest.raises(
        DataError, match="`langauge`, which none of the first 100 records has"
    ) as caught:
        list(read_documents([path], config, counts))
    assert "language" in caught.value.hint
    assert counts.filtered["langauge == 'en'"] < 150


def test_a_field_that_only_some_records_have_is_no_typing_error(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [{"text": f"{n}"} for n in range(50)]
    path = write(tmp_path / "a.jsonl", [*records, {"text": "good", "rating": 5}])
    found = list(read_documents([path], PrepareConfig(filter=("rating > 3",)), ReadCounts()))
    assert [d.text for d in found] == ["good"]


def test_a_field_that_only_a_later_source_has_can_be_named(tmp_path: Path) -> None:
    without = write(tmp_path / "a.jsonl", [{"text": f"{n}"} for n in range(150)])
    with_it = write(tmp_path / "b.jsonl", [{"text": f"b{n}", "lang": "de"} for n in range(3)])
    with pytest.raises(DataError, match="none of the first 100 records") as caught:
        list(
            read_documents(
                [without, with_it], PrepareConfig(filter=("lang != 'de'",)), ReadCounts()
            )
        )
    assert "`fields['lang']`" in caught.value.hint
    config = PrepareConfig(filter=("fields['lang'] != 'de'",))
    assert len(list(read_documents([without, with_it], config, ReadCounts()))) == 150
