"""How a product of a few rows may be computed: by which kernel, in which blocks, tried in turn."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

from pyper.kernels import launch, row_linear, thin_linear, thin_streams
from pyper.kernels.launch import block_of
from pyper.kernels.thin_linear import MOST_ROWS, Blocks


@dataclass(frozen=True)
class Way:
    """Of the kernel in use, or of the one on trial."""

    trial: bool
    lines: int = 8
    """Of each weight row, asked for ahead."""
    warm: bool = True
    outputs: int = 64
    programs: int = 2
    """On one processor."""
    inputs: int = 0
    """Of a step; 0: as usual."""

    def blocks(self, n_outputs: int, n_inputs: int, n_rows: int, alone: bool) -> Blocks:
        usual = USUAL(n_outputs, n_inputs, n_rows, alone)
        block_b = max(block_of(n_rows, MOST_ROWS), 16)
        if self.programs == 1:  # about as many as there are processors, each with all the room
            parts = block_of(-(-96 * self.outputs // n_outputs), 8)
            stages = thin_streams.stages_of(self.outputs, block_b, 1)
            usual = usual._replace(splits=parts, stages=stages)
        if self.inputs:
            room = 100 * 1024 // ((self.outputs + block_b) * 2 * self.inputs)
            usual = usual._replace(inputs=self.inputs, stages=room)
        return usual._replace(outputs=self.outputs, warps=self.outputs // 16)


WAYS = {
    "loads": Way(False),
    "loads 16 lines": Way(False, lines=16),
    "loads 64 inputs": Way(False, inputs=64),
    "streams": Way(True),
    "streams cold": Way(True, warm=False),
    "streams one": Way(True, programs=1),
    "streams one 2 lines": Way(True, programs=1, lines=2),
    "streams wide": Way(True, programs=1, outputs=128),
}
"""Of whole layers."""
USUAL = sys.modules[thin_linear.__module__]._blocks


def few_rows() -> ModuleType:
    return sys.modules[thin_linear.__module__]


@contextmanager
def computed(way: Way) -> Iterator[mock.Mock]:
    """Products of several rows are; yields what counts calls of the kernel on trial."""
    module, counted = few_rows(), mock.Mock(wraps=thin_streams.streamed_linear)
    with ExitStack() as stack:
        for where, name, value in (
            (launch, "ON_TRIAL", way.trial),
            (thin_streams, "WARM", way.warm),
            (module, "MOST_LINES", way.lines),
            (module, "_blocks", way.blocks),
            (module, "streamed_linear", counted),
        ):
            stack.enter_context(mock.patch.object(where, name, value))
        yield counted


@contextmanager
def blocks(batch: int, shape: Sequence[Any]) -> Iterator[None]:
    """Kernels in this block shape."""
    module = row_linear if batch == 1 else few_rows()
    with mock.patch.object(module, "_blocks", return_value=shape):
        yield


@contextmanager
def changed(**changes: Any) -> Iterator[None]:
    """Kernels of one row in their usual blocks, but for `changes`."""
    usual = row_linear._blocks
    other = mock.Mock(side_effect=lambda *shape: usual(*shape)._replace(**changes))
    with mock.patch.object(row_linear, "_blocks", other):
        yield
