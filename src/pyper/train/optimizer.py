"""AdamW or Muon over the weights of one expert, exact in float32 where the model is bf16."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyper.config import TrainConfig
from pyper.errors import CheckpointError
from pyper.kernels import AdamWSettings, TableCache, gradient_norm
from pyper.nn import Transformer
from pyper.train.adamw import AdamW
from pyper.train.muon import Muon, step_together
from pyper.train.trained_weight import TrainedWeight


class ExpertOptimizer:
    """What one optimizer step needs: groups, clipping, rates, low halves of weights, state."""

    def __init__(
        self, model: Transformer, config: TrainConfig, learning_rate: float, random_seed: int = 0
    ) -> None:
        """`learning_rate` is AdamW's peak; Muon's own keeps its ratio to the configured one.

        random_seed: of rounding at random, where the run file asks for it.
        """
        self._weights = [
            TrainedWeight(name, parameter, _low_half(parameter, config))
            for name, parameter in model.named_parameters()
        ]
        self._optimizers = list(_build(model, self._weights, config, learning_rate, random_seed))
        self._peaks = [float(optimizer.lr) for optimizer in self._optimizers]
        if model.device.type == "cuda":
            for optimizer in self._optimizers:
                optimizer.lr = torch.tensor(optimizer.lr, device=model.device)
        self._clip = config.gradient_clip
        self._tables = TableCache()
        self._as_they_are = torch.ones((), device=model.device)
        self._factor = self._as_they_are

    def collect_gradients(self) -> None:
        """After each backward pass: what bf16 would lose is summed in float32."""
        for weight in self._weights:
            weight.collect_gradient()

    def clip_gradients(self, scale: Tensor | float = 1.0) -> Tensor:
        """Have the update multiply gradients by `scale` and clip them.

        Returns the norm of the scaled gradients before clipping, in float32 at least; no gradient
        is touched.
        """
        norm = self._norm() * scale
        self._factor = self._as_they_are * scale
        if self._clip is not None:
            self._factor = self._factor * (self._clip / (norm + 1e-6)).clamp(max=1.0)
        return norm

    def set_rates(self, rate_factor: float) -> None:
        """Update at `rate_factor` of the peak rates from now on."""
        for optimizer, peak in zip(self._optimizers, self._peaks, strict=True):
            if isinstance(optimizer.lr, Tensor):  # where a recorded step reads it
                optimizer.lr.fill_(peak * rate_factor)
            else:
                optimizer.lr = peak * rate_factor

    def step(self, rate_factor: float) -> None:
        """Update all weights at `rate_factor` of the peak rates, then clear the gradients."""
        self.set_rates(rate_factor)
        self.update_weights()

    def update_weights(self) -> None:
        """Update all weights at the rates that are set, then clear the gradients."""
        update_together([self])
        self.clear_gradients()

    def clear_gradients(self) -> None:
        """Drop all gradients."""
        for weight in self._weights:
            weight.clear_gradient()
        self._factor = self._as_they_are

    def state_dict(self) -> dict[str, Any]:
        """States of the optimizers and, of exact bf16 weights, the low halves; all by name."""
        low = {w.name: w.low for w in self._weights if w.low is not None}
        return {"optimizers": [o.state_dict() for o in self._optimizers], "low": low}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the states of `state_dict`; the model holds the weights of that moment.

        Moments come from the state, settings from the run file. Raises CheckpointError for a state
        that has float32 masters in place of low halves.
        """
        if "low" not in state:
            raise CheckpointError(
                "this optimizer state is of an older format, which cannot be read any more",
                hint="train on from the weights alone: `train.start_from`, in a new folder",
            )
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for weight in self._weights:
            if weight.low is not None and weight.name in state["low"]:
                weight.low.copy_(state["low"][weight.name])

    def _norm(self) -> Tensor:
        found = [(w.parameter, w.grad) for w in self._weights if w.grad is not None]
        if not found:
            return torch.zeros_like(self._as_they_are)
        weights, grads = zip(*found, strict=True)
        return gradient_norm(weights, grads, self._tables)


def update_together(optimizers: Sequence[ExpertOptimizer]) -> None:
    """Update the weights of several experts at the rates that are set; the gradients stay."""
    muons: list[tuple[Muon, Tensor]] = []
    for expert in optimizers:
        for optimizer in expert._optimizers:
            if isinstance(optimizer, Muon):
                muons.append((optimizer, expert._factor))
            else:
                optimizer.step(expert._factor)
    step_together([muon for muon, _ in muons], [factor for _, factor in muons])


def moment_bytes(config: TrainConfig) -> int:
    """What AdamW's moments take for each weight (Muon's one takes less)."""
    return 2 * state_bits(config) // 8


def state_bits(config: TrainConfig) -> int:
    """Of each moment: 8 or 32."""
    return 8 if config.optimizer == "adamw8bit" else config.state_bits


def _low_half(parameter: nn.Parameter, config: TrainConfig) -> Tensor | None:
    """Nothing yet: the float32 weight starts as the bf16 one."""
    if parameter.dtype != torch.bfloat16 or config.weights == "stochastic":
        return None
    return torch.zeros_like(parameter, dtype=torch.int16)


def _is_matrix(weight: TrainedWeight) -> bool:
    # A router's rows are compared with each other: orthogonal updates would level them.
    name = weight.name
    is_router = name.endswith("router.weight")
    return not is_router and name.endswith("weight") and weight.parameter.ndim >= 2


def _build(
    model: Transformer,
    weights: list[TrainedWeight],
    config: TrainConfig,
    learning_rate: float,
    random_seed: int,
) -> Iterator[AdamW | Muon]:
    # Matrices inside the blocks; those of the experts of a sparse layer are stacked in one tensor.
    inner = ("blocks.", "experts.")
    hidden = [w for w in weights if w.name.startswith(inner) and _is_matrix(w)]
    with_muon = hidden if config.optimizer == "muon" else []
    others = [w for w in weights if w not in with_muon]
    decayed = {w.name for w in hidden} | {"head.weight"}
    bits = state_bits(config)
    yield AdamW(
        others,
        [config.weight_decay if w.name in decayed else 0.0 for w in others],
        lr=learning_rate,
        settings=AdamWSettings(config.beta1, config.beta2, config.adam_eps, random_seed),
        state_bits=bits,
    )
    if with_muon:
        peak = config.muon_learning_rate
        if config.learning_rate != "auto":
            peak *= learning_rate / config.learning_rate
        c = model.config
        key_width = c.kv_heads * c.dim_per_head
        widths = (c.n_heads * c.dim_per_head, key_width, key_width)
        yield Muon(
            with_muon,
            lr=peak,
            momentum=config.muon_momentum,
            weight_decay=config.weight_decay,
            row_splits=[widths if w.name.endswith("qkv.weight") else None for w in with_muon],
            # A GPU is many times faster in bfloat16; a CPU need not be, so there it must be asked.
            dtype=torch.bfloat16 if model.device.type == "cuda" else model.dtype,
            state_bits=bits,
            random_seed=random_seed,
        )
