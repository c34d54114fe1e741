"""Where kernels in Triton's lower language (Gluon) run: it may change from version to version."""

from functools import cache

import torch

from pyper.kernels import launch

if launch.HAS_TRITON:
    import triton


def is_tried(device: int) -> bool:
    """Whether a device has Hopper's instructions, and Triton is a version that was tried."""
    return launch.HAS_TRITON and processors(device) > 0


# To torch.compile a constant. `torch.compiler.assume_constant_result` sets no more than this, but
# imports the compiler, and Triton with it.
is_tried._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def processors(device: int) -> int:
    """Multiprocessors of a device where such kernels run, else 0."""
    found = torch.cuda.get_device_properties(device)
    is_hopper = torch.version.hip is None and (found.major, found.minor) == (9, 0)
    tried = triton.__version__.startswith("3.6.") and is_hopper
    return found.multi_processor_count if tried else 0
