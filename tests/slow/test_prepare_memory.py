"""A large text is prepared in bounded memory, with the same bytes for any number of workers."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# torch alone takes about 200 MB of it; the rest is the sample that a tokenizer learns from, and a
# batch of text with its tokens.
BOUND_MB = 600


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("prepare_benchmark", BENCHMARKS / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="reads the usage of a child as POSIX has it")
def test_memory_does_not_grow_with_the_text(benchmark: ModuleType, tmp_path: Path) -> None:
    peaks = {}
    for megabytes, workers in ((20, (1, 2)), (205, (2,))):
        path = tmp_path / f"{megabytes}.jsonl"
        benchmark.make_text(path, megabytes)
        folder = tmp_path / str(megabytes)
        folder.mkdir()
        rows = [benchmark.measure(path, folder, "bpe", n) for n in workers]
        assert len({row["fingerprint"] for row in rows}) == 1
        peaks[megabytes] = max(row["peak_mb"] for row in rows)
    assert (tmp_path / "205.jsonl").stat().st_size > 200e6
    assert peaks[205] < BOUND_MB
    assert peaks[205] < peaks[20] + 100
