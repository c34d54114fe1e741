"""The kernel of `thin_linear` whose copies begin before it may: weights of bf16, on Hopper."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from pyper.kernels import launch
from pyper.kernels.launch import block_of
from pyper.kernels.overlap import overlap_options

if launch.HAS_TRITON:
    import triton

DEPTH = 64
"""Inputs of a step."""
WARM = True
"""Rows are sent for twice: at first, to have the copy engine read how they lie."""


def fits(x: Tensor, weight: Tensor, outputs: int, splits: int, activation: str) -> bool:
    """Whether blocks of so many outputs are whole, and so are the steps of each part."""
    if activation == "swiglu" or len(x) == 1:
        return False
    if weight.dtype != torch.bfloat16 or any(t.data_ptr() % 16 for t in (x, weight)):
        return False
    (N, D), whole = weight.shape, outputs % 64 == 0
    return whole and N % outputs == 0 and D % (DEPTH * splits) == 0 and _is_tried(x.device)


@cache
def _is_tried(device: torch.device) -> bool:
    """Hopper's instructions, and a version of Triton's lower language that was tried."""
    if device.type != "cuda" or not launch.HAS_TRITON or torch.version.hip is not None:
        return False
    version: str = triton.__version__
    return version.startswith("3.6.") and torch.cuda.get_device_capability(device) == (9, 0)


def streamed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    squares: Tensor | None,
    eps: float,
    activation: str,
    residual: Tensor | None,
    next_gain: Tensor | None,
    results: tuple[Tensor, Tensor, Tensor],
    part: Tensor | None,
    tickets: Tensor | None,
    outputs: int,
    splits: int,
    stages: int,
    lines: int,
    warps: int,
    overlap: bool,
) -> None:
    """Writes results (out, out · next_gain, squares of out); of `thin_linear`, where it `fits`."""
    (N, D), B = weight.shape, len(x)
    block_b = max(block_of(B, 64), 16)
    lines = min(lines, max(D // (DEPTH * splits) - stages, 0))
    lines = 1 << lines.bit_length() >> 1
    n_squares = 0 if squares is None else len(squares)
    constants = {"N": N, "D": D, "ACTIVATION": activation, "N_SQUARES": n_squares}
    constants |= {"SQUARES": block_of(max(n_squares, 1), 1 << 20), "HAS_BIAS": bias is not None}
    constants |= {"HAS_RESIDUAL": residual is not None, "HAS_NEXT": next_gain is not None}
    constants |= {"N_SPLITS": splits, "BLOCK_B": block_b, "BLOCK_N": outputs}
    constants |= {"STAGES": stages, "LINES": lines, "WARM": WARM}
    out, scaled, out_squares = results
    given = (weight, squares, bias, residual, out, next_gain, scaled, out_squares, part, tickets)
    options = {"num_warps": warps} | overlap_options(overlap, x.device)
    _launch((N // outputs, splits), x, given, B, eps, constants, options)


def stages_of(outputs: int, block_b: int, programs: int = 2) -> int:
    """Steps on their way: so many that so many programs have room on a processor."""
    return 224 // programs * 1024 // ((outputs + block_b) * 2 * DEPTH)


def _launch(
    grid: tuple[int, int],
    x: Tensor,
    given: tuple[Tensor | None, ...],
    B: int,
    eps: float,
    constants: dict[str, Any],
    options: dict[str, Any],
) -> None:
    from pyper.kernels.thin_streams_kernel import TILE_LAYOUT, thin_streams

    assert given[0] is not None
    tiles = [
        _tiles(t, constants[block], TILE_LAYOUT)
        for t, block in ((x, "BLOCK_B"), (given[0], "BLOCK_N"))
    ]
    thin_streams[grid](*tiles, *given, B, eps, **constants, **options)


def _tiles(x: Tensor, rows: int, layout: Any) -> Any:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(x, [*x.shape], [x.shape[1], 1], [rows, DEPTH], layout)
