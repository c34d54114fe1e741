"""Which kernels of a GPU some work runs, and where the GPU waits between them."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

_SHORTEST_GAP = 1.5  # microseconds: less lies between any two kernels


def kernels_of(work: Callable[[], object], shown: int = 40) -> str:
    """The kernels of one call, the longest first, and before which of them the GPU waited most."""
    if not torch.cuda.is_available():
        return "there is no GPU, and so no kernel"
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            work()
            torch.cuda.synchronize()
    except RuntimeError as error:  # not everybody may trace
        return str(error)
    kernels = sorted(profile.key_averages(), key=lambda k: -k.self_device_time_total)
    total = sum(k.self_device_time_total for k in kernels) / 1e3
    rows = [f"{k.self_device_time_total / 1e3:8.3f} ms {k.count:5} × {k.key[:90]}" for k in kernels]
    return "\n".join([f"{total:8.3f} ms of kernels", *rows[:shown], *_gaps(profile.events())])


def _gaps(events: Any) -> list[str]:
    """Time in which nothing ran, by the kernels before and behind it."""
    on_gpu = [e for e in events or [] if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in on_gpu)
    if not spans:
        return []
    waited: dict[str, list[float]] = defaultdict(list)
    busy_until, before = spans[0][1], spans[0][2]
    for start, end, name in spans[1:]:
        if start > busy_until:
            long = start - busy_until > _SHORTEST_GAP
            key = f"{before[:44]} → {name[:44]}" if long else "short ones"
            waited[key].append(start - busy_until)
        if end > busy_until:
            busy_until, before = end, name
    idle = sum(map(sum, waited.values())) / 1e3
    whole = (busy_until - spans[0][0]) / 1e3
    rows = sorted(waited.items(), key=lambda item: -sum(item[1]))[:12]
    lines = [f"{sum(gaps) / 1e3:8.3f} ms {len(gaps):5} × {key}" for key, gaps in rows]
    return [f"{whole:8.3f} ms from first to last, nothing runs in {idle:.3f} ms of them:", *lines]
