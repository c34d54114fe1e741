"""Casts to 8-bit floats in Triton's interpreter as GPUs round them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch

from kernels.on_triton import DEVICE, kernels


@contextmanager
def fp8_kernels() -> Iterator[None]:
    """As `kernels`. The interpreter (3.6) loses the carry of a mantissa that rounding fills up."""
    if DEVICE == "cuda":
        yield
        return
    from triton import language as tl
    from triton.runtime import interpreter

    plain = interpreter._convert_float
    types = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}

    def convert(given: Any, from_type: Any, to_type: Any, rounding: Any) -> Any:
        if to_type not in types or from_type != tl.float32:
            return plain(given, from_type, to_type, rounding)
        values = torch.from_numpy(np.ascontiguousarray(given).view(np.float32))
        return values.to(types[to_type]).view(torch.uint8).numpy().reshape(given.shape)

    with (
        kernels(),
        mock.patch.object(interpreter, "_convert_float", convert),
        np.errstate(over="ignore", invalid="ignore"),  # infinite times 0
    ):
        yield
