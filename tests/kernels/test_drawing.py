import importlib

import pytest
import torch

from kernels.hopper import run_for_hopper
from kernels.on_triton import DEVICE, kernels, needs_triton
from pyper.generate import SamplingBatch, SamplingConfig, draw, filtered_probs

drawing = importlib.import_module("pyper.kernels.drawing")
CPU = torch.device("cpu")
CONFIGS = [
    SamplingConfig(temperature=1.0),
    SamplingConfig(temperature=0.6, top_p=0.9),
    SamplingConfig(temperature=1.3, top_k=7),
    SamplingConfig(temperature=1.0, min_p=0.1),
    SamplingConfig(temperature=0.9, top_k=40, top_p=0.7, min_p=0.02),
    SamplingConfig(temperature=0.0, top_p=0.5),
    SamplingConfig(temperature=1e-3, top_p=0.99),
    SamplingConfig(temperature=2.0, top_k=1),
    SamplingConfig(temperature=1.0, top_k=9999, top_p=1e-6),
    SamplingConfig(temperature=1.0, min_p=1.0),
    SamplingConfig(temperature=1e30, top_p=0.497),
]


def rows_of(n: int, V: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(V)
    return (3 * torch.randn(n, V, generator=generator)).log_softmax(-1).to(DEVICE)


def assert_same(log_probs: torch.Tensor, configs: list[SamplingConfig], chance: float) -> None:
    uniforms = torch.full((len(configs),), chance, device=DEVICE)
    batch = SamplingBatch.of(configs, log_probs.device)
    expected = draw(log_probs.cpu(), SamplingBatch.of(configs, CPU), uniforms.cpu())
    with kernels():
        assert drawing.takes(log_probs)
        got = drawing.draw_rows(log_probs, batch.rules, uniforms)
    assert got.tolist() == expected.tolist()


@needs_triton
@pytest.mark.parametrize("chance", [0.0, 0.137, 0.5, 0.871, 0.9998])
@pytest.mark.parametrize("V", [257, 300])
def test_the_kernel_draws_what_the_operations_draw(V: int, chance: float) -> None:
    log_probs = rows_of(len(CONFIGS), V + 50)[:, :V]  # rows may lie apart
    assert_same(log_probs, CONFIGS, chance)


@needs_triton
@pytest.mark.parametrize("config", CONFIGS)
def test_of_equal_entries_the_first_stay(config: SamplingConfig) -> None:
    log_probs = rows_of(1, 40).mul(2).round().div(8).log_softmax(-1).expand(9, -1).contiguous()
    for chance in (0.03, 0.41, 0.77, 0.98):
        assert_same(log_probs[:1], [config], chance)


@needs_triton
@pytest.mark.parametrize("config", CONFIGS[:5])
def test_many_blocks_are_one_row(config: SamplingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "_BLOCK", 64)
    for chance in (0.02, 0.3, 0.62, 0.97):
        assert_same(rows_of(1, 1000), [config], chance)


@needs_triton
@pytest.mark.parametrize("config", [c for c in CONFIGS if c.top_k == 7 or c.top_p == 0.9])
def test_the_largest_chance_gives_a_token_that_stayed(config: SamplingConfig) -> None:
    log_probs, chance = rows_of(1, 300), torch.tensor([1 - 2**-24], device=DEVICE)
    batch = SamplingBatch.of([config], log_probs.device)
    with kernels():
        [token] = drawing.draw_rows(log_probs, batch.rules, chance).tolist()
    assert filtered_probs(log_probs / config.temperature, batch)[0, token] > 0


@needs_triton
@pytest.mark.parametrize("chance", [0.0, 0.999])
def test_entries_that_are_impossible_are_never_drawn(chance: float) -> None:
    scores = torch.tensor([[-torch.inf, 0.3, 0.3, -torch.inf, 0.4, -torch.inf]]).log_softmax(-1)
    assert_same(scores.to(DEVICE), [SamplingConfig(temperature=1.0)], chance)


BUILD = """
import importlib
from kernels.hopper import build

kernel = importlib.import_module("pyper.kernels.drawing")._draw_row
floats = ("x_ptr", "rules_ptr", "uniforms_ptr", "q_ptr")
types = dict.fromkeys(floats, "*fp32") | {"x_stride": "i32", "V": "i32", "token_ptr": "*i64"}
for has_top in (False, True):
    constants = {"BLOCK": 4096, "HAS_TOP": has_top}
    built = build(kernel, types, constants, whole=("x_stride", "V"), num_warps=16)
    assert built.metadata.shared < 48_000
    assert "atom" not in built.asm["ptx"]  # the same at every run
"""


@pytest.mark.skipif(not drawing.launch.HAS_TRITON, reason="Triton is not installed")
def test_the_kernel_builds_for_a_large_gpu() -> None:
    run_for_hopper(BUILD)
