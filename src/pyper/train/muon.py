"""Muon: momentum whose matrices are orthogonalised before each step (Jordan et al., 2024)."""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from pyper.kernels import Moment, TableCache, add_updates, nesterov
from pyper.train.trained_weight import TrainedWeight

# Quintic Newton–Schulz coefficients that push all singular values into about [0.7, 1.2].
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
# Numbers that are orthogonalised at once: more would only take memory.
_BATCH = 2**27


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


@dataclass(frozen=True)
class _Part:
    """One matrix: a whole weight, one expert's, or a part of a fused one."""

    weight: int
    """Which weight it belongs to."""
    number: int
    """Of all parts: the key of its random bits."""
    matrix: Tensor
    low: Tensor | None


class Muon:
    """p ← p·(1 − lr·wd) − lr·√max(1, rows/cols)·orthogonalize(Nesterov momentum).

    A tensor (E, rows, cols) is E matrices, each on its own. Matrices of one shape are
    orthogonalised in batched products.
    """

    def __init__(
        self,
        weights: Sequence[TrainedWeight],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        row_splits: Sequence[tuple[int, ...] | None],
        dtype: torch.dtype = torch.float32,
        state_bits: int = 32,
        random_seed: int = 0,
    ) -> None:
        """row_splits: for a fused matrix (query, key and value) the heights of its parts, which
        are treated on their own. dtype: of the products. state_bits: 8 or 32, of the momentum.
        random_seed: of what is rounded at random.
        """
        self.lr: float | Tensor = lr
        self.weights = list(weights)
        self._momentum, self._weight_decay = momentum, weight_decay
        self._row_splits, self.dtype = list(row_splits), dtype
        self._bits, self._random_seed = state_bits, random_seed
        self._step = torch.zeros((), device=weights[0].parameter.device)
        self._moments: list[Moment | None] = [None] * len(weights)
        self._parts = list(self._all_parts())
        self._tables = TableCache()

    @torch.no_grad()
    def step(self, factor: Tensor) -> None:
        """One update by gradients times `factor` of every matrix that has a gradient."""
        step_together([self], [factor])

    def directions(self, factor: Tensor) -> "Iterator[tuple[_Part, Tensor]]":
        """Count a step; all matrices that have a gradient, and where their momentum points."""
        self._step += 1
        grads = {i: grad for i, w in enumerate(self.weights) if (grad := w.grad) is not None}
        if not grads:
            return
        directions = self._directions(grads, factor)
        for part in self._parts:
            if part.weight in directions:
                yield part, next(directions[part.weight])

    def add(self, parts: "Sequence[_Part]", updates: Sequence[Tensor]) -> None:
        """Move matrices of one shape by their orthogonal updates."""
        rows, cols = parts[0].matrix.shape
        add_updates(
            [part.matrix for part in parts],
            [part.low for part in parts],
            updates,
            [part.number for part in parts],
            self._step,
            self.lr,
            self._weight_decay,
            -(max(1.0, rows / cols) ** 0.5),
            self._random_seed,
            self._tables,
        )

    def state_dict(self) -> dict[str, Any]:
        """Updates made, and momentum by name of weight."""
        pairs = zip(self.weights, self._moments, strict=True)
        moments = {w.name: m.state_dict() for w, m in pairs if m is not None}
        return {"step": float(self._step), "momentum": moments}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what is there of these weights, in other formats too."""
        self._step.fill_(state["step"])
        for i, weight in enumerate(self.weights):
            if weight.name in state["momentum"]:
                self._moment(i).load_state_dict(state["momentum"][weight.name])

    def _directions(self, grads: dict[int, Tensor], factor: Tensor) -> dict[int, Iterator[Tensor]]:
        """Of the parts of each weight, one after another."""
        given = list(grads.values())
        if any(g.dtype != given[0].dtype for g in given):
            given = [g.float() for g in given]
        whole = nesterov(
            [self._moment(i) for i in grads],
            given,
            list(grads),
            self._step,
            factor,
            self._momentum,
            self.dtype,
            self._random_seed,
            self._tables,
        )
        return {i: self._split(i, tensor) for i, tensor in zip(grads, whole, strict=True)}

    def _moment(self, i: int) -> Moment:
        moment = self._moments[i]
        if moment is None:
            parameter = self.weights[i].parameter.detach()
            moment = self._moments[i] = Moment.zeros(parameter, self._bits, signed=True)
        return moment

    def _all_parts(self) -> Iterator[_Part]:
        number = 0
        for i, weight in enumerate(self.weights):
            matrices = list(self._split(i, weight.parameter.detach()))
            lows = [None] * len(matrices) if weight.low is None else self._split(i, weight.low)
            for matrix, low in zip(matrices, lows, strict=True):
                yield _Part(i, number, matrix, low)
                number += 1

    def _split(self, i: int, tensor: Tensor) -> Iterator[Tensor]:
        rows = self._row_splits[i]
        for matrix in tensor.unbind() if tensor.ndim == 3 else (tensor,):
            yield from (matrix,) if rows is None else matrix.split(rows)


@torch.no_grad()
def step_together(optimizers: Sequence[Muon], factors: Sequence[Tensor]) -> None:
    """`step` of several, each with its own gradients times its factor, in common products."""
    kinds: dict[Hashable, list[tuple[Muon, _Part, Tensor]]] = defaultdict(list)
    for muon, factor in zip(optimizers, factors, strict=True):
        for part, direction in muon.directions(factor):
            kinds[part.matrix.shape, muon.dtype].append((muon, part, direction))
    for found in kinds.values():
        size = max(1, _BATCH // found[0][1].matrix.numel())
        for start in range(0, len(found), size):
            _update(found[start : start + size])


def _update(found: Sequence[tuple[Muon, _Part, Tensor]]) -> None:
    """Matrices of one shape; those of one optimizer follow each other."""
    updates = iter(orthogonalize(torch.stack([d for _, _, d in found]), found[0][0].dtype).unbind())
    for muon, own in groupby(found, key=lambda triple: triple[0]):
        parts = [part for _, part, _ in own]
        muon.add(parts, [next(updates) for _ in parts])
