"""What a run decides from the machine it is on."""

import resource
import subprocess
import sys
from collections.abc import Callable
from statistics import median

import pytest
import torch

from pyper.config import RunConfig, parse_run
from pyper.stages import context
from pyper.stages.context import multiplies_bf16, resolve_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_precision_is_bf16_only_where_products_of_it_are_native(
    monkeypatch: pytest.MonkeyPatch, native: bool, expected: str
) -> None:
    monkeypatch.setattr(context, "multiplies_bf16", lambda device: native)
    experts = [{"index": 0, "precision": "auto"}, {"index": 1, "precision": "fp32"}]
    run = parse_run({"train": {"steps": 8, "precision": "auto"}, "expert": experts})

    resolved = resolve_precision(run, CPU)

    assert resolved.train.precision == expected
    assert resolved.expert_train(0).precision == expected
    assert resolved.expert_train(1).precision == "fp32"
    assert resolved.expert_train(2).precision == expected


def test_a_named_precision_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "multiplies_bf16", lambda device: True)
    run = parse_run({"train": {"steps": 8, "precision": "fp32"}})
    assert resolve_precision(run, CPU) == run


def test_a_cpu_without_matrix_instructions_is_left_in_fp32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert not multiplies_bf16(CPU)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert multiplies_bf16(CPU)


FAULTS = """
import resource, sys, torch
from pyper.stages.process import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
torch.set_num_threads(1)
def step():
    kept = [torch.ones(n << 18) for n in (3, 7, 5, 11, 2, 6)]  # in MiB
# Kept, one block may be mapped once more in the first dozen; returned, glibc learns in time.
for _ in range(40 if sys.argv[1] == "kept" else 3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_is_used_again_without_being_mapped_anew() -> None:
    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    few = (34 << 20) // resource.getpagesize() // 8  # an eighth of one step's pages
    # What glibc does depends a little on where the system put the heap.
    assert median(faults("kept") for _ in range(3)) < few
    assert any(faults("returned") > few for _ in range(10))


def test_every_stage_prepares_its_process(
    open_new: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(context, "keep_freed_memory", lambda: calls.append(1))
    open_new("any")
    assert calls == [1]
