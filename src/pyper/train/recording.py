"""A step as two CUDA graphs, one that makes gradients and one that updates weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from pyper.data import Batch

Measured = TypeVar("Measured")


@dataclass(frozen=True)
class Recording(Generic[Measured]):
    """Kernels that read the same memory and write the same memory at every replay."""

    inputs: tuple[Batch, ...]
    gradients: torch.cuda.CUDAGraph
    measured: Measured
    """What the first graph writes."""
    update: torch.cuda.CUDAGraph

    def fits(self, batches: Sequence[Batch]) -> bool:
        """Whether batches have the shapes that were recorded."""
        return [b.tokens.shape for b in self.inputs] == [b.tokens.shape for b in batches]

    def replay_gradients(self, batches: Sequence[Batch]) -> Measured:
        """Of these batches. Never waits for the device."""
        for static, batch in zip(self.inputs, batches, strict=True):
            static.tokens.copy_(batch.tokens, non_blocking=True)
            static.targets.copy_(batch.targets, non_blocking=True)
        self.gradients.replay()
        return self.measured


def record(
    batches: Sequence[Batch],
    device: torch.device,
    compute: Callable[[tuple[Batch, ...]], Measured],
    update: Callable[[], None],
) -> Recording[Measured]:
    """Record `compute` on copies of `batches`, and `update`; neither runs yet.

    Both must have run as usual before: they allocate optimizer states, build kernels, choose
    algorithms.
    """
    inputs = tuple(Batch(b.tokens.to(device), b.targets.to(device)) for b in batches)
    torch.cuda.empty_cache()  # of usual steps: a recording has memory of its own
    pool = torch.cuda.graph_pool_handle()
    gradients, updating = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    # "thread_local": the loader's threads go on pinning memory meanwhile.
    with torch.cuda.graph(gradients, pool, capture_error_mode="thread_local"):
        measured = compute(inputs)
    with torch.cuda.graph(updating, pool, capture_error_mode="thread_local"):
        update()
    return Recording(inputs, gradients, measured, updating)
