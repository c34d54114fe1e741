"""Where kernels run. Without Triton, or off the GPU, their PyTorch twins do the work."""

from importlib.util import find_spec

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None

_DTYPES = (torch.bfloat16, torch.float32, torch.int64)


def runs_triton(x: Tensor) -> bool:
    """Whether work on x goes to a Triton kernel: bf16, fp32 or an index on CUDA, with Triton.

    Kernels run on the current device, which is to be that of x.
    """
    return HAS_TRITON and x.is_cuda and x.dtype in _DTYPES


def block_of(size: int, largest: int) -> int:
    """The power of two that holds `size`, at most `largest`."""
    return min(1 << (size - 1).bit_length(), largest)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type to add up in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
