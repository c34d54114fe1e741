"""The products of a layer of `8x1b5`, alone and one after another, as decoding calls them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyper.generate.narrow_weights import NarrowLinear, thin_weight
from pyper.kernels import InputNorm, ThinWeight, thin_linear, thin_linear_torch
from pyper.kernels.thin_blocks import TICKETS
from pyper.kernels.thin_linear import ThinRows, thin_residual

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
NORM, RESIDUAL = {"norm": True}, {"residual": True}
PRODUCTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "qkv": (3, 1, NORM),
    "out": (1, 1, RESIDUAL),
    "up": (4, 1, NORM | {"activation": "gelu"}),
    "down": (1, 4, RESIDUAL),
    "head": (16, 1, NORM),
}
"""Outputs and inputs of the products of a layer, in widths, and what stands around them."""
Layer = tuple[ThinWeight, ...]


def weights(n_out: int, n_in: int, stored: str, size: int) -> list[ThinWeight]:
    """As many copies as hold `size` bytes."""
    linear = nn.Linear(n_in, n_out, bias=False, device=DEVICE, dtype=torch.bfloat16)
    kept = linear if stored == "bf16" else NarrowLinear(linear, stored)
    first = thin_weight(kept)
    n = size // first.weight.nbytes + 1
    return [ThinWeight(first.weight.clone(), first.scale, None) for _ in range(n)]


def inputs(
    batch: int, n_out: int, n_in: int, around: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE).to(torch.bfloat16)

    options: dict[str, Any] = {"activation": around.get("activation")}
    options["norm"] = InputNorm(draw(n_in), 1e-6) if "norm" in around else None
    options["residual"] = draw(batch, n_out) if "residual" in around else None
    return draw(batch, n_in), options


def as_decoding(
    x: Tensor, options: dict[str, Any], *, overlap: bool = True
) -> Callable[..., Tensor]:
    """The product as decoding calls it: rows came prepared, and are prepared for the next norm."""
    rows, tickets = prepared(x, options["norm"]), tickets_of()
    following = (
        InputNorm(x.new_ones(options["residual"].shape[1]), 1e-6)
        if (options["residual"] is not None)
        else None
    )

    def run(_: Tensor, weight: ThinWeight, **given: Any) -> Tensor:
        if following is not None:
            added = given["residual"], following
            return thin_residual(x, weight, *added, tickets=tickets, overlap=overlap).rows
        return thin_linear(rows, weight, **given, tickets=tickets, overlap=overlap)

    return run


def tickets_of() -> Tensor:
    return torch.zeros(TICKETS, dtype=torch.int32, device=DEVICE)


def prepared(x: Tensor, norm: InputNorm | None) -> ThinRows:
    """As the product before would write them."""
    if norm is None or len(x) == 1:
        return ThinRows(x)
    squares = x.float().square().unflatten(1, (-1, min(64, x.shape[1]))).sum(2)
    return ThinRows(x, x * norm.gain, squares.T.contiguous())


def layers(width: int, stored: str, size: int) -> list[Layer]:
    """As many as hold `size` bytes."""
    sizes = [PRODUCTS[name][:2] for name in ("qkv", "out", "up", "down")]
    first = [weights(o * width, i * width, stored, 0)[0] for o, i in sizes]
    n = size // sum(w.weight.nbytes for w in first) + 1
    return [tuple(ThinWeight(w.weight.clone(), w.scale, None) for w in first) for _ in range(n)]


def torch_layer(x: Tensor, layer: Layer) -> Tensor:
    qkv, out, up, down = layer
    norm = InputNorm(x.new_ones(x.shape[1]), 1e-6)
    thin_linear_torch(x, qkv, norm=norm)
    rows = thin_linear_torch(x, out, residual=x)
    hidden = thin_linear_torch(rows, up, norm=norm, activation="gelu")
    return thin_linear_torch(hidden, down, residual=rows)


def layer_as_decoding(x: Tensor) -> Callable[..., Tensor]:
    norm = InputNorm(x.new_ones(x.shape[1]), 1e-6)
    first, given = prepared(x, norm), {"tickets": tickets_of(), "overlap": True}

    def run(_: Tensor, layer: Layer) -> Tensor:
        qkv, out, up, down = layer
        thin_linear(first, qkv, norm=norm, **given)
        rows = thin_residual(x, out, x, norm, **given)
        hidden = thin_linear(rows, up, norm=norm, activation="gelu", **given)
        return thin_residual(hidden, down, rows.rows, norm, **given).rows

    return run
