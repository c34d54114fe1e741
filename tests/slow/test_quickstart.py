"""`pyper quickstart`, from nothing to text."""

import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import json_of

pytestmark = pytest.mark.slow

# As a person runs it: all cores, whatever the tests were given.
ALL_CORES = {"OMP_NUM_THREADS": str(os.cpu_count())}
FEW_STEPS = ("--set", "train.steps=160")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture(scope="module")
def short(folder: Path) -> dict[str, Any]:
    """What the quickstart prints after few steps."""
    result: dict[str, Any] = json_of("quickstart", *FEW_STEPS, cwd=folder, **ALL_CORES)
    return result


def numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(inner)
    elif isinstance(value, int | float):
        yield value


def test_its_json_holds_every_number_of_the_table(short: dict[str, Any]) -> None:
    report = short["evaluation"]

    assert all(math.isfinite(number) for number in numbers_in(short))
    assert report["routed"].keys() == {"16", "32", "64"}
    assert report["posterior"].keys() == {"top1", "top2", "all"}
    assert report["bits_per_byte"].keys() >= {"control", "routed_32"}
    assert report["random_shards"] is None
    assert len(report["experts"]) == len(report["load"]) == len(report["by_domain"]) == 8
    assert sum(report["load"]) == pytest.approx(1, abs=1e-3)
    assert report["oracle"] <= min(report["experts"])
    assert 0 < report["control"] < 2 * math.log(512)
    for row in report["by_domain"].values():
        assert row.keys() >= {"control", "experts", "oracle", "routed", "posterior"}
        assert len(row["experts"]) == 8
    assert report["steps"] == {"seed": 80, "control": 80} | {f"expert:{e}": 10 for e in range(8)}


def test_it_writes_from_every_domain(short: dict[str, Any]) -> None:
    samples = short["samples"]
    assert [s["domain"] for s in samples] == list(short["evaluation"]["by_domain"])
    assert all(s["prompt"] and s["text"] and s["experts"] for s in samples)


def test_its_mixture_writes_where_it_was_copied(
    short: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / short["folder"] / "mixture", tmp_path / "mine")
    arguments = ("generate", "mine", "-p", "The ", "-n", 12, "--mixing", "top1")
    (written,) = json_of(*arguments, cwd=tmp_path)["completions"]
    assert written["prompt"] == "The "
    assert 0 < len(written["tokens"]) <= 12


def test_a_second_time_it_only_writes_the_samples(short: dict[str, Any], folder: Path) -> None:
    start = time.monotonic()
    again = json_of("quickstart", *FEW_STEPS, cwd=folder, **ALL_CORES)
    assert time.monotonic() - start < 20
    assert again["evaluation"] == short["evaluation"]
    assert again["samples"] == short["samples"]
    assert again["corpus"] == short["corpus"]


def test_with_its_own_settings_the_mixture_is_below_the_control(tmp_path: Path) -> None:
    report = json_of("quickstart", cwd=tmp_path, **ALL_CORES)["evaluation"]
    assert report["oracle"] < report["posterior"]["top2"] < report["control"]
    assert report["routed"]["32"] < report["control"]
