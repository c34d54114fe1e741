"""Kernels where there is no GPU: Triton's interpreter runs them on CPU tensors, line by line."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from pyper.kernels import launch
from pyper.nn.rope import rotation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def runnable() -> str:
    """Why kernels cannot run here; empty where they can."""
    if not launch.HAS_TRITON:
        return "Triton is not installed"
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "there is no GPU, and TRITON_INTERPRET is not 1"
    return ""


needs_triton = pytest.mark.skipif(bool(runnable()), reason=runnable())
needs_emulation = pytest.mark.skipif(DEVICE != "cpu", reason="there the kernel itself runs")


@contextmanager
def kernels() -> Iterator[None]:
    """What is called inside runs as kernels, interpreted where there is no GPU."""
    if DEVICE == "cuda":
        yield
        return
    from triton.runtime import interpreter

    def takes(x: Tensor) -> bool:
        return x.dtype in (torch.bfloat16, torch.float32, torch.int64)

    plain_dot = interpreter.InterpreterBuilder.create_dot

    def dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain_dot(builder, _as_float32(a), _as_float32(b), *rest)

    plain_patches = interpreter._patch_lang_tensor

    def patches(tensor: Any, scope: Any) -> None:
        plain_patches(tensor, scope)
        # NumPy (2.4) takes no array of one number for a bound of a loop.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    with (
        mock.patch.object(launch, "runs_triton", takes),
        mock.patch.object(interpreter, "_patch_lang_tensor", patches),
        mock.patch.object(interpreter.InterpreterBuilder, "create_dot", dot),
        _boolean_masks(),
        np.errstate(over="ignore"),  # exp of much is infinite; a GPU does not warn of it
    ):
        yield


@contextmanager
def _boolean_masks() -> Iterator[None]:
    """The interpreter (3.9) makes whole numbers of comparing two scalars, then refuses them."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def boolean(mask: Any) -> Any:
        return TensorHandle(mask.data.astype(bool), mask.dtype)

    def loaded(builder: Any, pointers: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        return load(builder, pointers, boolean(mask), *rest, **more)

    def stored(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(builder, pointers, value, boolean(mask), *rest)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", loaded),
        mock.patch.object(InterpreterBuilder, "create_masked_store", stored),
    ):
        yield


def _as_float32(handle: Any) -> Any:
    """The interpreter (3.6) keeps bf16 as its bits, and multiplies those as integers."""
    from triton import language as tl
    from triton.runtime.interpreter import TensorHandle

    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is NaN (or the largest integer), so that what is not written shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def angles(rows: int, T: int, K: int, *, by_row: bool) -> tuple[Tensor, Tensor]:
    """cos and sin of positions 0 … T − 1, or of others in every row."""
    at = torch.arange(rows * T).view(rows, T) * 7 % 11 if by_row else torch.arange(T)
    cos, sin = rotation(at.to(DEVICE), K, 10_000.0, None)
    return cos.unsqueeze(-2), sin.unsqueeze(-2)


def leaf(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy that collects gradients."""
    return x.detach().to(dtype or x.dtype).clone().requires_grad_()


def error(value: Tensor | None, reference: Tensor | None) -> float:
    """‖value − reference‖ / ‖reference‖; NaN stays NaN."""
    assert value is not None
    assert reference is not None
    assert value.shape == reference.shape
    reference = reference.detach().double()
    size = reference.norm().item() or 1.0
    return (value.detach().double() - reference).norm().item() / size


def compare_compiled(loss: Callable[..., Tensor], given: list[Tensor]) -> None:
    """A loss of kernels and its gradients, eager beside one whole graph."""
    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [leaf(part) for part in given]
        with kernels():
            value = run(*leaves)
            results.append([value, *torch.autograd.grad(value, leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert error(compiled, eager) < 1e-6


def limit(dtype: torch.dtype) -> float:
    """What rounding may do: inputs in bf16 keep 8 bits, sums in float32 24."""
    return 8e-3 if dtype == torch.bfloat16 else 5e-6


def random_index(n_tokens: int, n_experts: int, capacity: int, seed: int = 0) -> Tensor:
    """(E, C), each row different tokens in any order."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(n_tokens, generator=generator)[:capacity] for _ in range(n_experts)]
    return torch.stack(rows).to(DEVICE)
