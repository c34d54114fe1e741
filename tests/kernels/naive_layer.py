"""Expert choice in a layer as one would explain it: token by token, expert by expert."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kernels.on_triton import leaf, random, random_index


@dataclass
class Weights:
    """What the layer is given and has gradients of; biases and residual may be missing."""

    x: Tensor
    residual: Tensor | None
    router: Tensor
    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None

    def leaves(self, dtype: torch.dtype | None = None) -> "Weights":
        parts = (getattr(self, field.name) for field in fields(self))
        return Weights(*(None if part is None else leaf(part, dtype) for part in parts))

    def named(self) -> dict[str, Tensor]:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: part for name, part in parts.items() if part is not None}


def random_weights(
    N: int,
    D: int,
    F: int,
    E: int,
    *,
    dtype: torch.dtype = torch.float32,
    residual: bool = True,
    biases: bool = False,
    swiglu: bool = False,
    seed: int = 0,
) -> Weights:
    width = 2 * F if swiglu else F
    return Weights(
        random(N, D, seed=seed, dtype=dtype),
        random(N, D, seed=seed + 1, dtype=dtype) if residual else None,
        (random(E, D, seed=seed + 2) * D**-0.5),
        (random(E, width, D, seed=seed + 3) * D**-0.5).to(dtype),
        (random(E, D, F, seed=seed + 4) * F**-0.5).to(dtype),
        random(E, width, seed=seed + 5, dtype=dtype) if biases else None,
        random(E, D, seed=seed + 6, dtype=dtype) if biases else None,
    )


def random_products(E: int, C: int, D: int, d_ff: int) -> dict[str, Tensor]:
    """Of the two products around GELU, in bf16: E experts read C each of C + 44 tokens."""
    return {
        "rows": random(E, C, D, seed=0, dtype=torch.bfloat16),
        "dy": random(E, C, D, seed=1, dtype=torch.bfloat16),
        "up": random(E, d_ff, D, seed=2, dtype=torch.bfloat16) / D**0.5,
        "down": random(E, D, d_ff, seed=3, dtype=torch.bfloat16) / D**0.5,
        "gates": random(C + 44, E, seed=4).softmax(-1),
        "index": random_index(C + 44, E, C),
    }


def naive_layer(
    w: Weights, index: list[list[int]], gate: str = "softmax", activation: str = "gelu"
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, logits, gates) for given choices, index[e] = the tokens of expert e."""
    logits = w.x @ w.router.T
    gates = logits.softmax(dim=1) if gate == "softmax" else logits.sigmoid()
    out = []
    for n, token in enumerate(w.x):
        total = torch.zeros_like(token) if w.residual is None else w.residual[n]
        for e, members in enumerate(index):
            if n in members:
                total = total + gates[n, e] * one_expert(w, e, token, activation)
        out.append(total)
    return torch.stack(out), logits, gates


def one_expert(w: Weights, e: int, token: Tensor, activation: str) -> Tensor:
    hidden = w.up[e] @ token
    if w.up_bias is not None:
        hidden = hidden + w.up_bias[e]
    if activation == "swiglu":
        a, b = hidden.split(len(hidden) // 2)
        hidden = a * a.sigmoid() * b
    elif activation == "relu2":
        hidden = hidden.clamp(min=0) ** 2
    else:
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    y = w.down[e] @ hidden
    return y if w.down_bias is None else y + w.down_bias[e]


def chosen(scores: Tensor, capacity: int) -> list[list[int]]:
    """Each expert's highest of scores (N, E), by sorting."""
    columns = scores.T.tolist()
    return [sorted(range(len(c)), key=lambda n, c=c: -c[n])[:capacity] for c in columns]
