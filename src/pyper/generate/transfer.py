"""Small tensors on their way to the device and back."""

from dataclasses import dataclass

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


@dataclass(frozen=True)
class OnItsWay:
    """Tensors on the host, perhaps before their values are there."""

    tensors: tuple[Tensor, ...]
    arrived: torch.cuda.Event | None

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors once they have arrived; what the device was given later is not waited for."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tensors


def to_host(*tensors: Tensor) -> OnItsWay:
    """Copies that the host does not wait for yet."""
    if tensors[0].device.type != "cuda":
        return OnItsWay(tensors, None)
    host = tuple(torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in tensors)
    for there, here in zip(tensors, host, strict=True):
        here.copy_(there, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return OnItsWay(host, arrived)
