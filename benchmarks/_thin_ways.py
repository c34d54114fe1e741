"""In which blocks a product of a few rows may be computed, tried in turn."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

from pyper.kernels import row_linear, thin_blocks, thin_stream
from pyper.kernels.thin_blocks import Blocks

WAYS: dict[str, dict[str, int]] = {
    "Triton's ring": {},
    "2 lines": {"lines": 2},
    "16 lines": {"lines": 16},
    "3 stages": {"stages": 3},
    "64 inputs": {"inputs": 64, "stages": 10},
    "8 warps": {"warps": 8},
}
"""Of whole layers, not streamed: `Blocks`, and lines of each weight row asked for ahead."""


@contextmanager
def computed(lines: int | None = None, **changes: int) -> Iterator[None]:
    """Products of several rows are, in Triton's blocks but for the changes."""
    usual, lines = thin_blocks._blocks, lines or thin_blocks.MOST_LINES

    def other(weight: Tensor, *given: Any) -> Blocks:
        found: Blocks = usual(weight, *given)._replace(**changes)
        return found

    with not_streamed(), mock.patch.multiple(thin_blocks, _blocks=other, MOST_LINES=lines):
        yield


@contextmanager
def blocks(batch: int, shape: Sequence[Any]) -> Iterator[None]:
    """Kernels in this block shape."""
    module = row_linear if batch == 1 else thin_blocks
    with not_streamed(), mock.patch.object(module, "_blocks", return_value=shape):
        yield


def not_streamed() -> AbstractContextManager[object]:
    return mock.patch.object(thin_stream, "is_tried", return_value=False)


@contextmanager
def changed(**changes: Any) -> Iterator[None]:
    """Kernels of one row in their usual blocks, but for `changes`."""
    usual = row_linear._blocks
    other = mock.Mock(side_effect=lambda *shape: usual(*shape)._replace(**changes))
    with mock.patch.object(row_linear, "_blocks", other):
        yield
