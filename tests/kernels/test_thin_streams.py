"""Products whose weights are sent for before the kernel may begin: emulated, built, on Hopper."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from kernels.gluon_emulated import Pointer, Tiles, Value, _method, emulated, run
from kernels.on_triton import DEVICE, error, kernels, limit, needs_triton, poisoned, random
from kernels.test_thin_linear import every, naive, tickets_of
from pyper.kernels import InputNorm, ThinWeight, launch, thin_linear, thin_streams
from pyper.kernels.thin_linear import Blocks, thin_residual

KERNEL = Path(thin_streams.__file__).with_name("thin_streams_kernel.py")
BF16 = torch.bfloat16
# B, D, N
SHAPES = [(2, 256, 64), (16, 1024, 256), (19, 256, 128), (64, 2048, 64)]


for _name in ("lt", "truediv"):
    setattr(Value, f"__{_name}__", _method(f"__{_name}__"))


@dataclass
class Padded(Tiles):
    """The copy engine reads zeros behind the last row."""

    def tile(self, at: Any) -> Tensor:
        (row, column), (rows, columns) = at, self.block
        found = self.data[row : row + rows, column : column + columns]
        return torch.nn.functional.pad(found, (0, 0, 0, rows - len(found)))


def language(n_blocks: int) -> dict[str, Any]:
    """What the kernel needs and the other emulated ones do not, and its epilogue in plain torch."""
    names = emulated(KERNEL)
    gl, program = names["gl"], names["gl"].program_id
    gl.program_id = lambda axis: (program(0) % n_blocks, program(0) // n_blocks)[axis]
    gl.thread_barrier = lambda: None  # one thread is the whole group
    gl.BlockedLayout = lambda *given: None
    gl.num_warps = lambda: 4
    gl.rsqrt = lambda x: Value(x.data.rsqrt())
    gl.load = load

    def atomic_add(at: Pointer, value: int, sem: str) -> int:
        at.data[at.at] += value
        return int(at.data[at.at]) - value

    gl.atomic_add = atomic_add
    plain = gl.store
    gl.store = lambda at, value: plain(at, value if isinstance(value, Value) else _filled(value))
    nothing = {"ask_ahead": lambda lines: None, "wait_for_others": lambda overlap: None}
    names.update(nothing | {"finish": finish, "joined": joined})  # what the kernel looks up
    return names


def _filled(value: int) -> Value:
    return Value(torch.tensor(value, dtype=torch.int32))


def load(at: Pointer, mask: Value, other: float) -> Value:
    places = torch.where(mask.data, at.at, 0)
    return Value(torch.where(mask.data, at.data.flatten()[places], other))


def joined(part: Pointer, at: Value, n: int, size: int) -> Value:
    return Value(sum(part.data.view(-1)[at.data + i * size] for i in range(n)))


def finish(
    sums: Value,
    _: Value,
    n: Value,
    b: Value,
    added: tuple[Any, ...],
    outputs: tuple[Pointer, ...],
    B: int,
    *rest: Any,
) -> None:
    _, bias, residual = added
    out, next_gain, scaled, squares = outputs
    n_outputs, activation = rest[:2]
    total = sums.data[:, :B]
    if bias is not None:
        total = total + bias.data.float()[n.data][:, None]
    if activation == "gelu":
        total = torch.nn.functional.gelu(total)
    if residual is not None:
        total = total.to(BF16).float() + residual.data.float()[:, n.data].T
    out.data[:, n.data] = total.T.to(BF16)
    if next_gain is not None:
        wide = out.data[:, n.data].float()
        scaled.data[:, n.data] = (wide * next_gain.data.float()[n.data]).to(BF16)
        squares.data[int(n.data[0]) // len(n.data)] = wide.square().sum(1)
    assert n_outputs == out.data.shape[1]


def launched(
    grid: tuple[int, int],
    x: Tensor,
    given: tuple[Tensor | None, ...],
    B: int,
    eps: float,
    constants: dict[str, Any],
    options: dict[str, Any],
) -> None:
    assert given[0] is not None
    tiles = Padded(x, (constants["BLOCK_B"], 64)), Padded(given[0], (constants["BLOCK_N"], 64))
    around = [None if t is None else Pointer(t) for t in given]
    constants["OVERLAP"] = True
    kernel = language(grid[0])["thin_streams"]
    run(kernel, grid[0] * grid[1], *tiles, *around, B, eps, **constants)


@contextmanager
def emulation() -> Iterator[mock.Mock]:
    """The emulated kernel takes all products that it could on a GPU."""
    with (
        kernels(),
        poisoned(),
        mock.patch.object(launch, "ON_TRIAL", True),
        mock.patch.object(thin_streams, "_is_tried", return_value=True),
        mock.patch.object(thin_streams, "_launch", side_effect=launched) as launches,
    ):
        yield launches


needs_emulation = pytest.mark.skipif(DEVICE != "cpu", reason="there the kernel itself runs")


@needs_triton
@needs_emulation
@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_does_what_a_loop_does(shape: tuple[int, int, int], splits: int) -> None:
    (B, D, N), tickets, blocks = shape, tickets_of(), Blocks(64, 64, splits, 3, 4, True)
    x, residual = random(B, D, dtype=BF16), random(B, N, seed=4, dtype=BF16)
    first = ThinWeight(random(N, D, seed=1, dtype=BF16))
    second = ThinWeight(random(128, N, seed=2, dtype=BF16), bias=random(128, seed=3, dtype=BF16))
    norm = InputNorm(1 + 0.3 * random(N, seed=5, dtype=BF16), 1e-5)
    module = sys.modules[thin_linear.__module__]
    with emulation() as launches, mock.patch.object(module, "_blocks", return_value=blocks):
        rows = thin_residual(x, first, residual, norm, tickets=tickets)
        got = thin_linear(rows, second, norm=norm, activation="gelu", tickets=tickets)
    assert launches.call_count == 2
    assert error(rows.rows, naive(x, first, None, None, residual)) < limit(BF16)
    assert error(got, naive(rows.rows, second, norm, "gelu", None)) < 2 * limit(BF16)
    assert not tickets.any()


@needs_triton
@needs_emulation
def test_other_products_take_the_other_kernel() -> None:
    x = random(3, 128, dtype=BF16)
    wide, narrow = (random(n, 128, seed=1, dtype=BF16) for n in (128, 96))
    norm = InputNorm(random(128, dtype=BF16), 1e-5)
    with emulation() as launches:
        thin_linear(x, ThinWeight(narrow))
        thin_linear(x, ThinWeight(wide), activation="swiglu")
        thin_linear(x, ThinWeight(wide), norm=norm)
        thin_linear(x[:1], ThinWeight(wide))
        thin_linear(x[:, :96].contiguous(), ThinWeight(wide[:, :96].contiguous()))
    assert launches.call_count == 0


BUILD = """
import os, re, subprocess, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from pyper.kernels import thin_streams, thin_streams_kernel as kernels

def described(rows):
    return f"tensordesc<bf16[{rows}, 64],{kernels.TILE_LAYOUT!r}>"

def build(N, D, block_b, block_n, splits, before, warps=4, programs=2):
    constants = dict(N=N, D=D, ACTIVATION="gelu" if before else "", N_SQUARES=32 if before else 0,
                     SQUARES=32, HAS_BIAS=False, HAS_RESIDUAL=not before, HAS_NEXT=not before,
                     N_SPLITS=splits, BLOCK_B=block_b, BLOCK_N=block_n,
                     STAGES=thin_streams.stages_of(block_n, block_b, programs), LINES=8,
                     WARM=True, OVERLAP=True, bias_ptr=None)
    constants |= dict(residual_ptr=None, next_gain_ptr=None) if before else dict(squares_ptr=None)
    types = {"x_tiles": described(block_b), "weight_tiles": described(block_n), "B": "i32"}
    types |= {"eps": "fp32", "squares_ptr": "*fp32", "next_squares_ptr": "*fp32"}
    types |= {"part_ptr": "*fp32", "tickets_ptr": "*i32"}
    names = kernels.thin_streams.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "*bf16") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if "*" in signature[n]}
    source = GluonASTSource(kernels.thin_streams, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})

def spilled(ptx):
    tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/ptxas")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [tool, "-v", "--gpu-name", "sm_90a", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return [int(n) for n in re.findall(r"(\\d+) bytes spill", said)]

for block_b in 16, 32, 64:
    for case in (
        (8192, 2048, block_b, 64, 1, True),
        (2048, 8192, block_b, 64, 4, False, 4, 1),  # one program on a processor
        (32768, 2048, block_b, 128, 1, True),
        (8192, 2048, block_b, 128, 2, True, 8, 1),
    ):
        built = build(*case)
        ptx = built.asm["ptx"]
        before, after = ptx.split("griddepcontrol.wait")
        assert "cp.async.bulk.tensor" in before and "cp.async.bulk.tensor" in after
        assert "wgmma.mma_async" in after
        # the next kernel's programs fit beside
        assert built.metadata.shared <= (115_700 if case[-1] is True else 232_448)
        assert spilled(ptx) == [0, 0], case
"""


@needs_triton
@pytest.mark.slow
def test_all_shapes_build_and_send_for_weights_before_they_wait() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", BUILD], check=True, env=environment)


def on_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@needs_triton
@pytest.mark.skipif(not on_hopper(), reason="there is no Hopper GPU")
@pytest.mark.parametrize("B", every(3, [16, 2, 33, 64]))
def test_on_a_gpu_it_does_what_the_other_kernel_does(B: int) -> None:
    tickets = tickets_of()
    first, second = (
        ThinWeight(random(n, d, seed=n, dtype=BF16) / 64) for n, d in ((2048, 8192), (8192, 2048))
    )
    x, residual = random(B, 8192, dtype=BF16), random(B, 2048, seed=4, dtype=BF16)
    norm = InputNorm(1 + 0.3 * random(2048, seed=5, dtype=BF16), 1e-5)
    said = []
    for trial in (False, True):
        streamed = mock.patch.object(
            *(sys.modules[thin_linear.__module__], "streamed_linear"),
            wraps=thin_streams.streamed_linear,
        )
        with mock.patch.object(launch, "ON_TRIAL", trial), streamed as launches:
            for _ in range(20):  # one right behind the other
                rows = thin_residual(x, first, residual, norm, tickets=tickets, overlap=True)
                given: dict[str, Any] = {"norm": norm, "activation": "gelu", "overlap": True}
                got = thin_linear(rows, second, tickets=tickets, **given)
            said += [rows.rows, got]
        assert launches.call_count == 40 * trial
    assert error(said[2], said[0]) < limit(BF16)
    assert error(said[3], said[1]) < 2 * limit(BF16)
    assert not tickets.any()
