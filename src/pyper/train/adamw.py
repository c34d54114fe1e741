"""AdamW (Loshchilov & Hutter, 2017) over weights in any of the formats of `pyper.kernels`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyper.kernels import AdamWSettings, AdamWTensors, Moment, TableCache, adamw_step
from pyper.train.trained_weight import TrainedWeight

# Moments of norms and biases stay in float32: they weigh nothing.
_SMALL = 4096


class AdamW:
    """Moments and step counts of some weights. Moments are made when a gradient first comes."""

    def __init__(
        self,
        weights: Sequence[TrainedWeight],
        decays: Sequence[float],
        *,
        lr: float,
        settings: AdamWSettings,
        state_bits: int = 32,
    ) -> None:
        """decays: weight decay of each weight; state_bits: 8 or 32, of moments."""
        self.lr: float | Tensor = lr
        self.weights, self.decays = list(weights), list(decays)
        self._settings, self._bits = settings, state_bits
        device = weights[0].parameter.device if weights else None
        self._steps = torch.zeros(len(weights), device=device)
        self._tensors: list[AdamWTensors | None] = [None] * len(weights)
        self._tables = TableCache()

    @torch.no_grad()
    def step(self, factor: Tensor) -> None:
        """One update by gradients times `factor` of every weight that has a gradient."""
        found = [(i, grad) for i, w in enumerate(self.weights) if (grad := w.grad) is not None]
        tensors = [self._tensors_of(i) for i, _ in found]
        grads = [grad for _, grad in found]
        adamw_step(tensors, grads, self._steps, self.lr, factor, self._settings, self._tables)

    def state_dict(self) -> dict[str, Any]:
        """By name of weight: updates made, and the two moments."""
        steps = self._steps.tolist()
        return {
            w.name: {
                "step": steps[i],
                "mean": t.mean.state_dict(),
                "square": t.square.state_dict(),
            }
            for i, (w, t) in enumerate(zip(self.weights, self._tensors, strict=True))
            if t is not None
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what is there of these weights, in other formats too."""
        for i, weight in enumerate(self.weights):
            if weight.name not in state:
                continue
            saved, tensors = state[weight.name], self._tensors_of(i)
            self._steps[i] = saved["step"]
            tensors.mean.load_state_dict(saved["mean"])
            tensors.square.load_state_dict(saved["square"])

    def _tensors_of(self, i: int) -> AdamWTensors:
        tensors = self._tensors[i]
        if tensors is None:
            weight = self.weights[i]
            parameter = weight.parameter.detach()
            bits = self._bits if parameter.numel() >= _SMALL else 32
            tensors = self._tensors[i] = AdamWTensors(
                weight=parameter,
                low=weight.low,
                mean=Moment.zeros(parameter, bits, signed=True),
                square=Moment.zeros(parameter, bits, signed=False),
                weight_decay=self.decays[i],
                number=i,
            )
        return tensors
