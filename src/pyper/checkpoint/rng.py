"""The random number generators of a process, so that a resumed run draws what it would have."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def capture_rng() -> dict[str, Any]:
    """States of Python's, NumPy's (legacy), torch's and each CUDA device's global generator.

    Nested, as `flatten_state` takes it. CUDA is asked only once it is in use: asking would open a
    context on every visible device.
    """
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call, unused-ignore]
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if in_use else [],
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Put all generators back; devices that this machine lacks are left out."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available():
        for device, saved in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(saved.cpu(), device)
