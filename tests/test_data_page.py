"""The commands of docs/data.md work as printed, on small files of the kinds they name."""

import csv
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pyper.cli.main import app
from pyper.config import parse_run
from pyper.data import TokenData
from pyper.data.text_measures import MEASURES

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """The `pyper` lines of all shell blocks, in order."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines()]
    return [line[1:] for line in lines if line]


def texts(word: str, n: int = 40) -> list[str]:
    return [f"{word} number {i} is a line of some length, and {i * i} too" for i in range(n)]


def write_sources(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pyarrow, feather = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.feather")
    parquet = pytest.importorskip("pyarrow.parquet")
    for domain in ("sea", "law"):
        (folder / "texts" / domain).mkdir(parents=True)
        for i, text in enumerate(texts(domain)):
            (folder / "texts" / domain / f"{i}.txt").write_text(text)
    records: list[dict[str, Any]] = [{"body": text} for text in texts("page")]
    (folder / "pages.jsonl").write_text("\n".join(map(json.dumps, records)))
    with (folder / "table.csv").open("w", newline="") as stream:
        rows = [[t, ["law", "sea"][i % 2], i / 40] for i, t in enumerate(texts("row"))]
        csv.writer(stream).writerows([["body", "source", "score"], *rows])
    parquet.write_table(pyarrow.table({"text": texts("parquet")}), folder / "rows.parquet")
    feather.write_feather(pyarrow.table({"text": texts("feather")}), folder / "rows.feather")
    table = pyarrow.table({"text": texts("arrow")})
    with pyarrow.ipc.new_stream(str(folder / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    rows = datasets.Dataset.from_dict({"text": texts("saved")})
    datasets.DatasetDict({"train": rows, "test": rows.select(range(5))}).save_to_disk(
        str(folder / "saved")
    )
    chats = [
        {"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": t[::-1]}]}
        for t in texts("chat")
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (folder / "template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )


def test_the_commands_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_sources(tmp_path)
    local = [c for c in commands() if not any(part.startswith("hf:") for part in c)]
    assert len(local) >= 12
    for command in local:
        small = [] if "--tokenizer" in command else ["--vocab-size", "300"]
        result = CliRunner().invoke(app, [*command, *small], catch_exceptions=False)
        assert result.exit_code == 0, f"{command}: {result.output}"
        assert "warning" not in result.output
    domains = {p.name: TokenData.open(p, verify=True).domains for p in Path("data").iterdir()}
    assert domains["folder"] == domains["table"] == ["law", "sea"]
    assert domains["columns"] == ["rows"]
    assert domains["mixed"] == ["chats", "texts"]
    assert TokenData.open(Path("data/good")).manifest.counts["filter: float(score) > 0.3"] == 13
    assert TokenData.open(Path("data/own-template")).documents("train").weights is not None


def test_the_example_of_weights_is_a_run_file() -> None:
    match = re.search(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    assert match is not None
    run = parse_run(tomllib.loads(match[1]))
    assert run.data.weights == {"law": 2.0, "novels": 0.5}
    assert run.domain_weights(0, "law") == {"law": 3.0}


def test_the_page_names_all_that_filters_count() -> None:
    assert [name for name in MEASURES if f"`{name}`" not in PAGE] == []
