"""Tokens per second, and the share of the device's peak that they use."""

import time

import torch

from pyper.nn import Transformer, train_flops_per_token

# Dense bf16 peaks by the vendors' data sheets, FLOP/s.
_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12, "4090": 165e12}


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak, where it is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _PEAKS.items() if key in name), None)


class Throughput:
    """A clock over the steps of one process."""

    def __init__(self, model: Transformer, seq_len: int, tokens_per_step: int) -> None:
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = train_flops_per_token(model.config, seq_len)
        self._peak = peak_flops(model.device)
        self._before = 0.0
        self._start = self._mark = time.monotonic()
        self._marked_step: int | None = None

    def start(self, seconds_before: float) -> None:
        """Begin timing; `seconds_before` were spent by earlier processes."""
        self._before = seconds_before
        self._start = self._mark = time.monotonic()

    @property
    def seconds(self) -> float:
        """Training time so far, earlier processes included."""
        return self._before + time.monotonic() - self._start

    def measure(self, step: int) -> dict[str, float]:
        """Rates since the last call: `tokens_per_second`, and `mfu` where the peak is known."""
        now = time.monotonic()
        if self._marked_step is None:
            rates: dict[str, float] = {}
        else:
            tokens = (step - self._marked_step) * self._tokens_per_step
            speed = tokens / max(now - self._mark, 1e-9)
            rates = {"tokens_per_second": round(speed, 1)}
            if self._peak is not None:
                rates["mfu"] = round(speed * self._flops_per_token / self._peak, 4)
        self._mark, self._marked_step = now, step
        return {"seconds": round(self.seconds, 3), **rates}
