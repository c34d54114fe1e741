"""A parameter, and what belongs to it while it is trained."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class TrainedWeight:
    """With gradients of bf16 parameters kept apart: autograd would add them up in bf16."""

    name: str
    parameter: nn.Parameter
    low: Tensor | None = None
    """int16, the low halves of float32 weights whose high halves are the bf16 parameter."""
    _collected: Tensor | None = None

    @property
    def grad(self) -> Tensor | None:
        """The sum of the gradients so far."""
        return self.parameter.grad if self._collected is None else self._collected

    def collect_gradient(self) -> None:
        """After a backward pass. One gradient stays as it is, several are summed in float32."""
        new = self.parameter.grad
        if new is None or self.parameter.dtype != torch.bfloat16:
            return
        if self._collected is None:
            self._collected = new
        else:
            self._collected = self._collected.float().add_(new)
        self.parameter.grad = None

    def clear_gradient(self) -> None:
        """Drop all gradients."""
        self.parameter.grad = self._collected = None
