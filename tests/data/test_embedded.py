import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pyper.config import PrepareConfig
from pyper.data import HarvestReport, embedded, harvest, harvest_code, prepare
from pyper.errors import DataError, StorageError

CAP = 40_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("embedded") / "corpus"


@pytest.fixture(scope="module")
def report(folder: Path) -> HarvestReport:
    return harvest(folder, CAP)


def texts(folder: Path, domain: str) -> list[str]:
    lines = (folder / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def test_there_are_eight_domains_within_the_cap(report: HarvestReport, folder: Path) -> None:
    assert len(report.domains) == 8
    for name, domain in report.domains.items():
        found = texts(folder, name)
        assert domain.documents == len(found) == len(set(found))
        assert CAP // 2 <= domain.bytes == sum(len(t.encode()) for t in found) <= CAP


def test_another_process_harvests_the_same(report: HarvestReport, tmp_path: Path) -> None:
    script = (
        "import sys, pathlib; from pyper.data import harvest;"
        f"print(harvest(pathlib.Path(sys.argv[1]), {CAP}).fingerprint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "elsewhere")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "77"},
    )
    assert done.stdout.strip() == report.fingerprint


def test_nothing_tells_of_this_machine(report: HarvestReport, folder: Path) -> None:
    places = [sys.prefix, sys.base_prefix, str(Path.home()), os.uname().nodename]
    for name in report.domains:
        for text in texts(folder, name):
            assert not any(len(place) > 5 and place in text for place in places)
            assert not re.search(r"0x7f[0-9a-f]{8}", text)


def test_bytecode_whose_order_changes_from_run_to_run_is_left_out() -> None:
    body = "\n".join(f"    x = y + {i}" for i in range(20))
    source = f"def f(y):\n{body}\ndef g(y):\n    y in {{'a', 'b'}}\n{body}\n"
    listings = list(harvest_code._listings(compile(source, "", "exec")))
    assert [listing.split("(")[0] for listing in listings] == ["f"]


def test_code_is_stripped_of_comments_and_docstrings() -> None:
    body = "\n".join(f"    x = y + {i}  # kept" for i in range(20))
    source = f'# gone\ndef f(y):\n    """Gone."""\n    # gone\n{body}\n'
    assert list(harvest_code._definitions(source)) == [f"def f(y):\n{body}\n"]


def test_licences_at_the_top_of_headers_are_left_out() -> None:
    header = "// Copyright someone\n// All rights\n\n/* Licensed */\n#pragma once\n// kept\n"
    assert harvest_code._without_licence(header) == "#pragma once\n// kept\n"


def test_a_finished_harvest_is_reused_and_a_damaged_one_mended(
    report: HarvestReport, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(embedded, "_harvest", lambda *_: pytest.fail("harvested again"))
        assert harvest(folder, CAP) == report
    (folder / "cpp.jsonl").write_text("")
    assert harvest(folder, CAP).fingerprint == report.fingerprint
    assert texts(folder, "cpp")


def test_a_missing_domain_is_replaced_by_a_spare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = {name: lambda: iter(["x" * 900]) for name in embedded._DOMAINS}
    monkeypatch.setattr(embedded, "_DOMAINS", {**full, "maths": lambda: iter([])})
    report = harvest(tmp_path / "out", 1_000)
    assert "maths" not in report.domains
    assert len(report.domains) == 8


def test_too_little_text_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = {name: lambda: iter([]) for name in embedded._DOMAINS}
    monkeypatch.setattr(embedded, "_DOMAINS", nothing)
    with pytest.raises(DataError, match="only has text for"):
        harvest(tmp_path / "out", 1_000)


def test_other_files_are_never_removed(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match=r"thesis\.txt"):
        harvest(tmp_path, CAP)
    assert (tmp_path / "thesis.txt").exists()


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        harvest(tmp_path / "file" / "corpus", CAP)


def test_the_corpus_can_be_prepared(report: HarvestReport, folder: Path, tmp_path: Path) -> None:
    manifest = prepare([folder], tmp_path / "data", PrepareConfig(tokenizer="bytes"))
    assert sorted(manifest.domains) == sorted(report.domains)
    assert all(entry.documents for splits in manifest.domains.values() for entry in splits.values())
