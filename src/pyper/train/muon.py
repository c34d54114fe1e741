"""Muon: momentum whose matrices are orthogonalised before each step (Jordan et al., 2024)."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

# Quintic Newton–Schulz coefficients that push all singular values into about [0.7, 1.2].
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Approximate U·Vᵀ of the singular value decompositions of matrices (n, rows, cols).

    The products are made in `dtype`; bfloat16 is exact enough (singular values only need to come
    near 1), and several times as fast where the hardware has it.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = _A * x + torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C) @ x
    result: Tensor = (x.mT if tall else x).to(matrices.dtype)
    return result


class Muon(torch.optim.Optimizer):
    """p ← p·(1 − lr·wd) − lr·√max(1, rows/cols)·orthogonalize(Nesterov momentum).

    A tensor (E, rows, cols) is E matrices, each on its own.
    Matrices of one shape are orthogonalised in one batched product. `row_splits` gives, for a
    fused matrix (query, key and value), the heights of the parts that are treated on their own.
    `dtype` is that of the products.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        row_splits: Sequence[tuple[int, ...] | None],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._row_splits = list(row_splits)
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            self._step_group(group["params"], group["lr"], group["momentum"], group["weight_decay"])

    def _step_group(
        self, params: list[Tensor], lr: float | Tensor, momentum: float, weight_decay: float
    ) -> None:
        active = [i for i, p in enumerate(params) if p.grad is not None]
        grads = [grad for p in params if (grad := p.grad) is not None]
        buffers = [self._buffer(params[i]) for i in active]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        directions = torch._foreach_lerp(grads, buffers, momentum)
        torch._foreach_mul_([params[i] for i in active], 1 - lr * weight_decay)
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for i, direction in zip(active, directions, strict=True):
            for part, target in self._parts(i, direction, params[i]):
                by_shape[part.shape].append((part, target))
        for shape, pairs in by_shape.items():
            updates = orthogonalize(torch.stack([part for part, _ in pairs]), self._dtype)
            updates *= -lr * max(1.0, shape[0] / shape[1]) ** 0.5
            torch._foreach_add_([p for _, p in pairs], list(updates.unbind()))

    def _buffer(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        buffer: Tensor = state["momentum_buffer"]
        return buffer

    def _parts(self, i: int, direction: Tensor, param: Tensor) -> list[tuple[Tensor, Tensor]]:
        whole = [(direction, param)]
        if param.ndim == 3:
            whole = list(zip(direction.unbind(), param.unbind(), strict=True))
        rows = self._row_splits[i]
        if rows is None:
            return whole
        return [pair for d, p in whole for pair in zip(d.split(rows), p.split(rows), strict=True)]
