"""AdamW or Muon over the weights of one expert, with float32 masters where weights are bf16."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyper.config import TrainConfig
from pyper.nn import Transformer
from pyper.train.muon import Muon


class ExpertOptimizer:
    """What one optimizer step needs: groups, clipping, rates, masters, state."""

    def __init__(self, model: Transformer, config: TrainConfig, learning_rate: float) -> None:
        """`learning_rate` is AdamW's peak; Muon's own keeps its ratio to the configured one."""
        self._model_params = list(model.parameters())
        self._masters = _make_masters(self._model_params)
        named = dict(
            zip((name for name, _ in model.named_parameters()), self._masters, strict=True)
        )
        self._optimizers = list(_build(model, named, config, learning_rate))
        self._peaks = [[g["lr"] for g in o.param_groups] for o in self._optimizers]
        if model.device.type == "cuda":
            for group in (group for o in self._optimizers for group in o.param_groups):
                group["lr"] = torch.tensor(group["lr"], device=model.device)
        self._clip = config.gradient_clip

    def collect_gradients(self) -> None:
        """After each backward pass: add bf16 gradients to the float32 sums of the masters."""
        for param, master in zip(self._model_params, self._masters, strict=True):
            if param is master or param.grad is None:
                continue
            if master.grad is None:
                master.grad = param.grad.float()
            else:
                master.grad.add_(param.grad)
            param.grad = None

    def clip_gradients(self, scale: Tensor | float = 1.0) -> Tensor:
        """Multiply gradients by `scale`, clip them; returns the norm before clipping."""
        grads = [m.grad for m in self._masters if m.grad is not None]
        if not isinstance(scale, float) or scale != 1.0:
            torch._foreach_mul_(grads, scale)
        norm = nn.utils.get_total_norm(grads)
        if self._clip is not None:
            torch._foreach_mul_(grads, (self._clip / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def set_rates(self, rate_factor: float) -> None:
        """Update at `rate_factor` of the peak rates from now on."""
        for optimizer, peaks in zip(self._optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                if isinstance(group["lr"], Tensor):  # where a recorded step reads it
                    group["lr"].fill_(peak * rate_factor)
                else:
                    group["lr"] = peak * rate_factor

    def step(self, rate_factor: float) -> None:
        """Update all weights at `rate_factor` of the peak rates, then clear the gradients."""
        self.set_rates(rate_factor)
        self.update_weights()

    def update_weights(self) -> None:
        """Update all weights at the rates that are set, then clear the gradients."""
        for optimizer in self._optimizers:
            optimizer.step()
        self.clear_gradients()
        self._copy_masters_to_model()

    def make_capturable(self) -> None:
        """From now on `update_weights` may be recorded in a CUDA graph."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["capturable"] = True

    def clear_gradients(self) -> None:
        """Drop all gradients."""
        for param, master in zip(self._model_params, self._masters, strict=True):
            param.grad = master.grad = None

    def state_dict(self) -> dict[str, Any]:
        """States of the optimizers and, for bf16 models, the float32 masters."""
        masters = [m for p, m in zip(self._model_params, self._masters, strict=True) if m is not p]
        states = [o.state_dict() for o in self._optimizers]
        for group in (group for state in states for group in state["param_groups"]):
            group["lr"] = float(group["lr"])
        return {"optimizers": states, "masters": masters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the states of `state_dict`; the model's weights follow the masters."""
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, settings in zip(optimizer.param_groups, own, strict=True):
                group.update(settings)  # moments come from the state, settings from the run file
        masters = [m for p, m in zip(self._model_params, self._masters, strict=True) if m is not p]
        with torch.no_grad():
            for master, saved in zip(masters, state["masters"], strict=True):
                master.copy_(saved)
        self._copy_masters_to_model()

    @torch.no_grad()
    def _copy_masters_to_model(self) -> None:
        for param, master in zip(self._model_params, self._masters, strict=True):
            if param is not master:
                param.copy_(master)


def _make_masters(params: list[nn.Parameter]) -> list[nn.Parameter]:
    """float32 copies of half-precision weights; full-precision ones are their own masters."""
    return [
        p if p.dtype in (torch.float32, torch.float64) else nn.Parameter(p.detach().float())
        for p in params
    ]


def _is_matrix(name: str, param: nn.Parameter) -> bool:
    # A router's rows are compared with each other: orthogonal updates would level them.
    return not name.endswith("router.weight") and name.endswith("weight") and param.ndim >= 2


def _build(
    model: Transformer, named: dict[str, nn.Parameter], config: TrainConfig, learning_rate: float
) -> Iterator[torch.optim.Optimizer]:
    # Matrices inside the blocks; those of the experts of a sparse layer are stacked in one tensor.
    inner = ("blocks.", "experts.")
    hidden = {n: p for n, p in named.items() if n.startswith(inner) and _is_matrix(n, p)}
    with_muon = hidden if config.optimizer == "muon" else {}
    decayed = [p for n, p in named.items() if n in hidden.keys() - with_muon.keys()]
    decayed += [p for n, p in named.items() if n == "head.weight"]
    others = [p for n, p in named.items() if n not in hidden and n != "head.weight"]
    yield torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        fused=True,
    )
    if with_muon:
        peak = config.muon_learning_rate
        if config.learning_rate != "auto":
            peak *= learning_rate / config.learning_rate
        c = model.config
        key_width = c.kv_heads * c.dim_per_head
        widths = (c.n_heads * c.dim_per_head, key_width, key_width)
        yield Muon(
            with_muon.values(),
            lr=peak,
            momentum=config.muon_momentum,
            weight_decay=config.weight_decay,
            row_splits=[widths if name.endswith("qkv.weight") else None for name in with_muon],
            # A GPU is many times faster in bfloat16; a CPU need not be, so there it must be asked.
            dtype=torch.bfloat16 if model.device.type == "cuda" else model.dtype,
        )
