"""Many tensors in one launch: a table of their addresses, and which program takes which piece.

An optimizer visits hundreds of tensors, most of them small; a launch for each would take the host
longer than the GPU takes for its work. Addresses that change from step to step, those of gradients,
reach the device as arguments of a kernel: no wait, and a recorded graph keeps them.
"""

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from pyper.kernels import launch

if launch.HAS_TRITON:
    import triton
    import triton.language as tl


class TensorTable:
    """Fixed addresses of tensors on one device, column by column, and their pieces."""

    def __init__(self, columns: Sequence[Sequence[Tensor]], piece: int) -> None:
        """Each column holds the same tensors' weights, or moments …; sizes are the first's.

        A program works on `piece` elements.
        """
        device = columns[0][0].device
        sizes = [t.numel() for t in columns[0]]
        self.aligned = all(map(is_aligned, (t for column in columns for t in column)))
        pointers = [[t.data_ptr() for t in column] for column in columns]
        self.addresses = torch.tensor(pointers, dtype=torch.int64).to(device)
        """(columns, tensors)"""
        self.sizes = torch.tensor(sizes, dtype=torch.int64).to(device)
        whole = np.array([size // piece for size in sizes])
        self.pieces = _pieces(whole, np.zeros_like(whole)).to(device)
        """(programs, 2) int32: tensor and piece, of pieces that are full."""
        tails = np.array([size % piece > 0 for size in sizes]).astype(whole.dtype)
        self.tails = _pieces(tails, whole).to(device)
        """The same of the last ones, which are not."""
        self._changing = torch.zeros(2, len(sizes), dtype=torch.int64, device=device)
        self._constants: dict[torch.dtype, Tensor] = {}
        self._entries = [list(row.unbind()) for row in self._changing]

    def changing(self, tensors: Sequence[Tensor], row: int = 0) -> Tensor:
        """Addresses (tensors,) of tensors that are others at every step; two rows of them."""
        self._changing[row].zero_()
        torch._foreach_add_(self._entries[row], [t.data_ptr() for t in tensors])
        return self._changing[row]

    def constant(self, numbers: Sequence[float], dtype: torch.dtype) -> Tensor:
        """Numbers (tensors,) that never change, on the device."""
        if dtype not in self._constants:
            self._constants[dtype] = torch.tensor(numbers, dtype=dtype).to(self.sizes.device)
        return self._constants[dtype]

    def launches(self) -> list[tuple[Tensor, bool]]:
        """Pieces, and whether they have to look where their tensor ends."""
        both = ((self.pieces, False), (self.tails, True))
        return [(pieces, masked) for pieces, masked in both if len(pieces)]


class TableCache:
    """Tables by what they are for; made once, before any step is recorded."""

    def __init__(self) -> None:
        self._tables: dict[Hashable, tuple[list[int], TensorTable]] = {}

    def get(self, key: Hashable, columns: Sequence[Sequence[Tensor]], piece: int) -> TensorTable:
        """The table of `key`, made anew where a tensor of the first column has moved."""
        found = [t.data_ptr() for t in columns[0]]
        known = self._tables.get(key)
        if known is None or known[0] != found:
            known = self._tables[key] = (found, TensorTable(columns, piece))
        return known[1]


def is_aligned(tensor: Tensor) -> bool:
    """Whether it can be read 16 bytes at a time."""
    return tensor.data_ptr() % 16 == 0


def as_aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that is contiguous and aligned."""
    tensor = tensor.contiguous()
    return tensor if is_aligned(tensor) else tensor.clone()


def triton_type(dtype: torch.dtype) -> "tl.dtype":
    """Triton's name of a type."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def _pieces(counts: "np.ndarray", first: "np.ndarray") -> Tensor:
    """(sum of counts, 2) int32: tensor, and its pieces from `first` on."""
    tensor = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(tensor)) - np.repeat(np.cumsum(counts) - counts, counts)
    pieces = np.stack((tensor, within + first[tensor]), axis=1)
    return torch.from_numpy(pieces.astype(np.int32))


if launch.HAS_TRITON:

    @triton.jit
    def pointer(entry, dtype: tl.constexpr, ALIGNED: tl.constexpr):
        """The address in an entry of a table, as a pointer."""
        address = tl.load(entry).to(tl.pointer_type(dtype))
        if ALIGNED:
            address = tl.multiple_of(address, 16)
        return address

    @triton.jit
    def read(pointers, inside, MASKED: tl.constexpr):
        """Load; 0 beyond the end of the tensor."""
        if MASKED:
            return tl.load(pointers, mask=inside, other=0)
        return tl.load(pointers)

    @triton.jit
    def write(pointers, value, inside, MASKED: tl.constexpr):
        """Store, but not beyond the end of the tensor."""
        if MASKED:
            tl.store(pointers, value, mask=inside)
        else:
            tl.store(pointers, value)
