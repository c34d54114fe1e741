"""The parts of the sparse layer, each with the bytes it must move or the products it must do."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from _timing import Step
from torch import Tensor

from pyper.kernels import choice, launch
from pyper.kernels import rows as row_kernels
from pyper.kernels.activation import activation_forward, activation_gradients
from pyper.kernels.gelu_products import down_gradient_gelu, fits, up_gelu
from pyper.kernels.router import logits_gradient, router_forward, router_weight_gradient


@dataclass(frozen=True)
class Stage:
    name: str
    step: Step
    gb: float = 0.0
    """10⁹ bytes read and written at least, for parts that move memory."""
    gflop: float = 0.0
    """10⁹ operations, for products."""


def stages(x: Tensor, router: Tensor, up: Tensor, down: Tensor, capacity: int) -> Iterator[Stage]:
    """In the order of a training step. Off the GPU there are no kernels: nothing."""
    if not launch.runs_triton(x):
        return
    with torch.no_grad():
        yield from _router_and_rows(x, router, capacity)
        yield from _feed_forward(x, router, up, down, capacity)


def _gb(*tensors: Tensor) -> float:
    return sum(t.numel() * t.element_size() for t in tensors) / 1e9


def _router_and_rows(x: Tensor, router: Tensor, capacity: int) -> Iterator[Stage]:
    logits, gates = router_forward(x, router, True)
    picked = choice.choose(gates, capacity)
    index, slots = picked.token_index, picked.slots
    rows = row_kernels.take_rows(x, index)
    part, total = _gb(rows), _gb(x)
    yield Stage("router, gates", lambda _: router_forward(x, router, True), total)
    yield Stage("  in torch, float32", lambda _: F.linear(x.float(), router).softmax(-1), total)
    yield Stage("top-k (torch, unsorted)", lambda _: gates.T.topk(capacity, sorted=False))
    yield Stage("  sorted", lambda _: gates.T.topk(capacity))
    yield Stage("choice with inverse", lambda _: choice.choose(gates, capacity))
    yield Stage("  in torch", lambda _: choice.choose_torch(gates, capacity))
    yield Stage("gather", lambda _: row_kernels.take_rows(x, index), 2 * part)
    yield Stage("  in torch", lambda _: x[index], 2 * part)
    yield Stage("combine", lambda _: row_kernels.sum_rows(rows, slots), part + total)
    yield Stage(
        "combine + residual",
        lambda _: row_kernels.sum_rows(rows, slots, None, x),
        part + 2 * total,
    )
    vectors = router.to(x.dtype)
    flat, at = rows.flatten(0, 1), index.flatten()
    yield Stage(
        "  index_add in torch", lambda _: torch.zeros_like(x).index_add(0, at, flat), part + total
    )
    yield Stage("combine + gates", lambda _: row_kernels.sum_rows(rows, slots, gates), part + total)
    yield Stage(
        "  its gradients",
        lambda _: row_kernels.combine_gradients(x, rows, gates, index),
        3 * part,
    )
    yield Stage(
        "gradient of x: combine + router",
        lambda _: row_kernels.sum_rows(rows, slots, None, None, logits, vectors),
        part + total,
    )
    yield Stage("gradient of logits", lambda _: logits_gradient(logits, gates, gates, True))
    yield Stage("gradient of router", lambda _: router_weight_gradient(logits, x), total)


def _feed_forward(
    x: Tensor, router: Tensor, up: Tensor, down: Tensor, capacity: int
) -> Iterator[Stage]:
    _, gates = router_forward(x, router, True)
    index = choice.choose(gates, capacity).token_index
    rows = row_kernels.take_rows(x, index)
    pre = torch.bmm(rows, up.mT)
    hidden = activation_forward(pre, "gelu", index, gates)
    size = _gb(pre)
    yield Stage("gated GELU", lambda _: activation_forward(pre, "gelu", index, gates), 2 * size)
    yield Stage("  F.gelu", lambda _: F.gelu(pre), 2 * size)
    yield Stage(
        "gated GELU, gradients",
        lambda _: activation_gradients(hidden, pre, "gelu", index, gates, False),
        3 * size,
    )
    yield Stage(
        "  and hidden rows again",
        lambda _: activation_gradients(hidden, pre, "gelu", index, gates, True),
        4 * size,
    )
    yield Stage(
        "  torch's GELU gradient",
        lambda _: torch.ops.aten.gelu_backward(hidden, pre),
        3 * size,
    )
    products = {
        "up": (rows, up.mT),
        "down": (hidden, down.mT),
        "gradient of hidden": (rows, down),
        "gradient of rows": (hidden, up),
        "gradient of up": (hidden.mT, rows),
        "gradient of down": (rows.mT, hidden),
    }
    for name, (a, b) in products.items():
        gflop = 2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2] / 1e9
        yield Stage(f"bmm {name}", lambda _, a=a, b=b: torch.bmm(a, b), gflop=gflop)
        yield Stage("  one mm per expert", lambda _, a=a, b=b: _one_by_one(a, b), gflop=gflop)
    if fits(rows, up, down, "gelu", None):
        yield from _fused(rows, up, down, gates, index)


def _fused(rows: Tensor, up: Tensor, down: Tensor, gates: Tensor, index: Tensor) -> Iterator[Stage]:
    """Each is a product and the pass over GELU behind it."""
    pre, gflop = torch.bmm(rows, up.mT), 2 * rows.numel() * up.shape[1] / 1e9
    yield Stage("up + GELU in one", lambda _: up_gelu(rows, up, gates, index), gflop=gflop)
    yield Stage(
        "  its gradient",
        lambda _: down_gradient_gelu(rows, down, pre, gates, index, False),
        gflop=gflop,
    )


def _one_by_one(a: Tensor, b: Tensor) -> Tensor:
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    for e in range(len(a)):
        torch.mm(a[e], b[e], out=out[e])
    return out
