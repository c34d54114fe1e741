"""Milliseconds and peak memory of one step, on a GPU by its own clock."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Step = Callable[[int], object]
"""A step of work. Its argument counts calls, so that inputs can take turns."""


def median_ms(step: Step, *, warmup: int = 5, repeats: int = 30) -> float:
    """Median time of a call, after `warmup` calls that are not counted."""
    for i in range(warmup):
        step(i)
    if not torch.cuda.is_available():
        return statistics.median(_wall_ms(step, i) for i in range(repeats))
    torch.cuda.synchronize()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    # The host stays ahead of the device, so that gaps between launches are not in the numbers.
    for i, (start, end) in enumerate(marks):
        start.record()
        step(i)
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks)


def _wall_ms(step: Step, i: int) -> float:
    start = time.perf_counter()
    step(i)
    return 1e3 * (time.perf_counter() - start)


def copied_bytes_per_second() -> float:
    """Read and written, of a copy that no cache holds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = torch.zeros(
        2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device
    )
    target = torch.empty_like(source)
    return 2 * source.nbytes / (median_ms(lambda _: target.copy_(source), repeats=10) / 1e3)


def peak_gb(step: Step) -> float | None:
    """Memory that one call needs beyond what is allocated before it; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(0)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def as_graph(step: Step) -> Step:
    """The step, recorded once as a CUDA graph; whatever it prints or waits for would fail here."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(3):
            step(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(0)
    return lambda _: graph.replay()


def measure(make: Callable[[], Step], repeats: int) -> dict[str, Any]:
    """A peer that does not run here says why, and the others go on."""
    try:
        step = make()
        return {"ms": median_ms(step, repeats=repeats), "peak_gb": peak_gb(step)}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:120]}
