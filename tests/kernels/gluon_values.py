"""What kernels emulated on a CPU hold: values, pointers, tiles, shared memory and its barriers."""

import threading
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TIMEOUT = 60.0
state = threading.local()
"""Of a thread: its program and number of programs, products that run, stores not yet read."""


class Value:
    """A tensor in registers, with as much of the language's methods as the kernels use."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.shape = tuple(data.shape)
        self.type = types.SimpleNamespace(layout=None)

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> "Value":
        return Value(self.data.view(dtype) if bitcast else self.data.to(dtype))

    def __getitem__(self, at: Any) -> "Value":
        return Value(self.data[at])


def raw(x: Any) -> Any:
    """The tensor of a `Value`; anything else as it is."""
    return x.data if isinstance(x, Value) else x


def _method(name: str) -> Callable[..., Any]:
    def method(self: Value, other: Any) -> Any:
        if isinstance(other, Pointer):
            return other + self
        return Value(getattr(self.data, name)(raw(other)))

    return method


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "and", "lshift", "gt", "lt", "truediv"):
    setattr(Value, f"__{_name}__", _method(f"__{_name}__"))


@dataclass
class Pointer:
    data: Tensor
    at: Any = 0

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.data, self.at + raw(offset))


@dataclass
class Tiles:
    """What the copy engine is told: a matrix and the shape of a tile."""

    data: Tensor
    block: tuple[int, int]
    layout: None = None

    def tile(self, at: Sequence[int]) -> Tensor:
        (row, column), (rows, columns) = at, self.block
        found = self.data[row : row + rows, column : column + columns]
        assert tuple(found.shape) == self.block
        return found


@dataclass
class Shared:
    data: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    def index(self, i: int) -> Any:
        return Shared(self.data[i]) if isinstance(self.data, Tensor) else self.data[i]

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.data.permute(order))

    def load(self, layout: Any) -> Value:
        return Value(self.data.clone())

    def store(self, value: Value) -> None:
        assert not state.stores, "the last store may still read this"
        self.data.copy_(value.data)


@dataclass
class Barrier:
    count: int = 0
    missing: int = 0
    bytes: int = 0
    phase: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def arrive(self, count: int = 1, expected: int = 0) -> None:
        with self.changed:
            self.missing -= count
            assert self.missing >= 0, "more arrive than were announced"
            self.bytes += expected
            self._turn()

    def came(self, size: int) -> None:
        with self.changed:
            self.bytes -= size
            self._turn()

    def _turn(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.count
            self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            done = self.changed.wait_for(lambda: self.phase & 1 != parity, TIMEOUT)
            assert done, "nobody comes"
