"""The map of several rows whose weights come early: emulated, and on a GPU itself."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from kernels.gluon_emulated import emulated, run
from kernels.gluon_values import Pointer, Value
from kernels.hopper import is_tried_triton, needs_hopper, run_for_hopper
from kernels.on_triton import (
    DEVICE,
    error,
    kernels,
    limit,
    needs_emulation,
    needs_triton,
    poisoned,
    random,
)
from kernels.test_thin_linear import BF16, compare, naive, tickets_of, weight_of
from pyper.kernels import InputNorm, thin_linear, thin_stream
from pyper.kernels.activation import activate
from pyper.kernels.thin_blocks import SHARED_BYTES
from pyper.kernels.thin_linear import thin_residual

OP = importlib.import_module("pyper.kernels.thin_linear")
# B, D, N: two tiles of inputs and many, parts of them, outputs that are no whole blocks
SHAPES = [(2, 256, 64), (5, 1536, 130), (17, 2048, 192), (64, 1024, 70)]


def launch_emulated(grid: tuple[int, int], *given: Any, **constants: Any) -> None:
    """What the kernel before writes is there once it is waited for, and not before."""
    x, _, _, squares, residual = given[:5]
    written = [t for t in (x, squares, residual) if t is not None]
    values = [t.clone() for t in written]

    def hide() -> None:
        for tensor in written:
            tensor.fill_(float("nan"))

    def show() -> None:
        for tensor, value in zip(written, values, strict=True):
            tensor.copy_(value)

    file = Path(thin_stream.__file__).with_name("thin_stream_kernel.py")
    names = emulated(file)
    names["gdc_wait"] = show
    names["_value_and_slope"] = lambda v, kind: (Value(activate(v.data, kind)), None)
    pointers = [Pointer(t) if isinstance(t, Tensor) else t for t in given]

    def program(*inner: Any, **named: Any) -> None:
        hide()
        names["stream"](*inner, **named)

    constants.pop("num_warps")
    run(program, grid, *pointers, **constants)


class Launcher:
    def __getitem__(self, grid: tuple[int, int]) -> Any:
        return partial(launch_emulated, grid)


@contextmanager
def streamed() -> Iterator[mock.Mock]:
    """Products of several rows go through this kernel, emulated where there is no GPU."""
    used = mock.Mock(wraps=thin_stream.stream_rows)
    if DEVICE == "cuda":
        with mock.patch.object(OP, "stream_rows", used):
            yield used
        return
    module = SimpleNamespace(stream=Launcher())
    fits = thin_stream.stream_fits

    def there(x: Tensor, *rest: Any) -> bool:
        return fits(SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=0)), *rest)

    with (
        kernels(),
        poisoned(),
        mock.patch.dict("sys.modules", {"pyper.kernels.thin_stream_kernel": module}),
        mock.patch.object(thin_stream, "is_tried", return_value=True),
        mock.patch.object(thin_stream, "stages_of", return_value=4),  # a ring goes round and round
        mock.patch.object(OP, "stream_fits", there),
        mock.patch.object(OP, "stream_rows", used),
    ):
        yield used


needs_either = pytest.mark.skipif(
    DEVICE == "cuda" and needs_hopper.args[0], reason="it is for Hopper GPUs"
)


@needs_triton
@needs_either
@pytest.mark.parametrize("choice", [(False, True, True, None), (False, False, False, "gelu")])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_matches_a_loop(shape: tuple[int, int, int], choice: tuple[object, ...]) -> None:
    tickets = tickets_of()
    with streamed() as used:
        compare(partial(thin_linear, tickets=tickets), shape, BF16, choice)
    assert used.call_count == 1
    assert not tickets.any()


@needs_triton
@needs_either
@pytest.mark.parametrize(("B", "D", "N"), [(3, 256, 384), (64, 2048, 256)])
def test_a_product_prepares_the_next_ones_norm(B: int, D: int, N: int) -> None:
    x, residual = random(B, D, seed=0, dtype=BF16), random(B, N, seed=4, dtype=BF16)
    first, second = (weight_of(N, size, BF16, bias=True) for size in (D, N))
    norm, tickets = InputNorm(1 + 0.3 * random(N, seed=3, dtype=BF16), 1e-5), tickets_of()
    with streamed() as used:
        for _ in range(2):
            prepared = thin_residual(x, first, residual, norm, tickets=tickets, overlap=True)
            given = {"norm": norm, "tickets": tickets, "overlap": True}
            got = thin_linear(prepared, second, activation="gelu", **given)
            assert error(prepared.rows, naive(x, first, None, None, residual)) < limit(BF16)
            assert error(got, naive(prepared.rows, second, norm, "gelu", None)) < 2 * limit(BF16)
            assert not tickets.any()
    assert used.call_count == 4


@needs_triton
@pytest.mark.parametrize(
    ("B", "D", "N", "stored", "activation"),
    [
        (4, 320, 64, BF16, "gelu"),  # no whole tiles
        (4, 128, 64, BF16, "gelu"),  # one
        (4, 256, 64, torch.int8, "gelu"),
        (4, 256, 64, BF16, "swiglu"),
        (64, 256, 16_384, BF16, "gelu"),  # blocks of 128 outputs are faster
    ],
)
@needs_emulation
def test_what_it_does_not_take_goes_the_usual_way(
    B: int, D: int, N: int, stored: torch.dtype, activation: str
) -> None:
    with streamed() as used:
        compare(
            partial(thin_linear, tickets=tickets_of()), (B, D, N), stored, (0, 0, 0, activation)
        )
    assert not used.called


@needs_triton
@needs_hopper
@pytest.mark.parametrize("B", [4, 16, 32, 64])
def test_at_real_shapes_a_recorded_layer_repeats_itself_to_the_bit(B: int) -> None:
    """Weights come early, rows never: whatever the kernel before wrote is what is multiplied."""
    D, tickets = 2048, tickets_of()
    up, down = (weight_of(n, d, BF16, bias=False) for n, d in ((4 * D, D), (D, 4 * D)))
    norm, x = InputNorm(random(D, seed=3, dtype=BF16), 1e-5), random(B, D, seed=0, dtype=BF16)
    up.weight.div_(D**0.5), down.weight.div_(2 * D**0.5)

    def layers(rows: Tensor) -> Tensor:
        found: Any = rows
        for _ in range(8):
            before = found if isinstance(found, Tensor) else found.rows
            given = {"norm": norm, "tickets": tickets, "overlap": True}
            hidden = thin_linear(found, up, activation="gelu", **given)
            found = thin_residual(hidden, down, before, norm, tickets=tickets, overlap=True)
        return found.rows

    expected = layers(x)
    graph = torch.cuda.CUDAGraph()
    with streamed() as used, torch.cuda.graph(graph):
        got = layers(x)
    assert used.call_count == 15  # the first rows come without the squares that it needs
    for _ in range(50):
        got.zero_()
        graph.replay()
        assert torch.equal(got, expected)


BUILD = """
from kernels.hopper import build, spilled_bytes
from pyper.kernels import thin_stream
from pyper.kernels.thin_stream_kernel import stream

types = {"B": "i32", "eps": "fp32", "tickets_ptr": "*i32"}
types |= {n: "*fp32" for n in ("squares_ptr", "part_ptr", "next_squares_ptr")}
for block_b in (16, 32, 64):
    stages = thin_stream.stages_of(block_b)
    shape = {"N": 8192, "D": 2048, "BLOCK_B": block_b, "STAGES": stages}
    shape |= {"OUTPUTS": 64, "INPUTS": 128, "BLOCK_SQUARES": 32}
    wide = {"ACTIVATION": "gelu", "N_SQUARES": 32, "N_SPLITS": 1, "residual_ptr": None}
    wide |= {f"{n}_ptr": None for n in ("next_gain", "next", "next_squares", "part", "tickets")}
    narrow = {"ACTIVATION": "", "N_SQUARES": 0, "N_SPLITS": 4, "squares_ptr": None}
    others = [wide | {"ACTIVATION": kind} for kind in ("gelu_tanh", "relu2", "")]
    for constants in (wide, narrow, *others):
        constants = shape | constants | {"bias_ptr": None}
        built = build(stream, types, constants, gluon=True, num_warps=4)
        ptx = built.asm["ptx"]
        early = ptx[: ptx.index("griddepcontrol.wait")].count("cp.async.cg")
        tiles = min(stages - 2, 2048 // 128 // constants["N_SPLITS"])
        assert early == 8 * tiles, (block_b, early)  # a tile is eight times 16 bytes a thread
        assert "wgmma" in ptx
        assert spilled_bytes(ptx) == [0, 0], block_b
        assert built.metadata.shared <= thin_stream.SHARED_BYTES
"""


@needs_triton
@pytest.mark.skipif(not is_tried_triton(), reason="Gluon is another one in this Triton")
@pytest.mark.slow
def test_weights_are_sent_for_before_the_kernel_waits() -> None:
    run_for_hopper(BUILD)


def test_a_ring_fits_the_shared_memory() -> None:
    for block_b in (16, 32, 64):
        stages = thin_stream.stages_of(block_b)
        tile = 2 * thin_stream.INPUTS * (thin_stream.OUTPUTS + block_b)
        assert 3 <= stages <= 10
        assert stages * tile <= SHARED_BYTES < (stages + 1) * tile or stages == 10
