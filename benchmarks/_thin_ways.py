"""In which blocks a product of a few rows may be computed, tried in turn."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

from torch import Tensor

from pyper.kernels import row_linear, thin_linear
from pyper.kernels.thin_linear import Blocks

WAYS: dict[str, dict[str, int]] = {
    "2 lines": {"lines": 2},
    "16 lines": {"lines": 16},
    "3 stages": {"stages": 3},
    "64 inputs": {"inputs": 64, "stages": 10},
    "8 warps": {"warps": 8},
}
"""Of whole layers, other than usual: `Blocks`, and lines of each weight row asked for ahead."""


def few_rows() -> ModuleType:
    return sys.modules[thin_linear.__module__]


@contextmanager
def computed(lines: int | None = None, **changes: int) -> Iterator[None]:
    """Products of several rows are, in their usual blocks but for the changes."""
    module = few_rows()
    usual, lines = module._blocks, lines or module.MOST_LINES

    def other(weight: Tensor, *given: Any) -> Blocks:
        found: Blocks = usual(weight, *given)._replace(**changes)
        return found

    with mock.patch.multiple(module, _blocks=other, MOST_LINES=lines):
        yield


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
