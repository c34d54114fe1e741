"""A function of tensors that never move, recorded as a CUDA graph: one launch for all it does."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Runs before recording: kernels are built and algorithms chosen.
_USUAL_RUNS = 3


def record(compute: Callable[[], Tensor], pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The graph, and what each replay overwrites.

    pool: memory that graphs which never overlap may share; then each replay also overwrites what
    others gave. None: memory of its own.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_USUAL_RUNS):
            compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Only of this thread: another may be loading an expert.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        out = compute()
    return graph, out
