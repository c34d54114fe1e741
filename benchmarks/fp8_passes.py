"""fp8 training of one layer: what each pass over its tensors costs, each product, and all of them.

    python benchmarks/fp8_passes.py [--tokens 16384] [--width 2048] [--json FILE]

Passes of Pyper's kernels beside torch.compile's, in µs and TB/s of what must be read and written.
Products in bf16 and of 8-bit factors, with sums in float32 and in the fewer bits of fast
accumulation. A layer's maps, forward and backward: in bf16, with 8-bit factors measured, cast and
transposed as each product needs them, and as Pyper does.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _record import add_json_option, write_record
from _timing import as_graph, median_ms
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pyper.kernels import dense_feed_forward, fp8_activation, fp8_cast
from pyper.kernels.fp8_cast import E4M3, E5M2, scales, to_fp8
from pyper.kernels.fp8_products import fp8_feed_forward, fp8_linear, product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Rows = dict[str, dict[str, float]]


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device=DEVICE).mul_(scale).bfloat16()


def us(function: Callable[..., object], *given: Any) -> float:
    """Of one call, recorded: launches cost nothing."""
    step = lambda _: function(*given)  # noqa: E731
    return 1e3 * median_ms(as_graph(step) if DEVICE == "cuda" else step)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(lambda *given: function(*given), dynamic=False)


def passes(N: int, D: int) -> Rows:
    """Of activations (N, 4 D) and (N, D), a weight, and GELU's (N, 4 D)."""
    one, found = torch.ones((), device=DEVICE), {}

    def row(name: str, size: int, ours: Callable[..., Any], twin: Any, *given: Any) -> None:
        mine, theirs = us(compiled(ours), *given), us(compiled(twin), *given)
        found[name] = {"µs": mine, "TB/s": size / mine / 1e6, "torch µs": theirs}

    for n, d in ((N, 4 * D), (N, D), (4 * D, D)):
        x, at, norms = normal(n, d), f"{n} × {d}", fp8_cast.largest_and_norm_of
        row(f"largest, {at}", 2 * n * d, fp8_cast.largest_of, lambda x: x.abs().amax(), x)
        row(f"largest and norms, {at}", 2 * n * d, norms, fp8_cast.measure_torch, x)
        both, twin = fp8_cast.cast_both, fp8_cast.cast_both_torch
        row(
            f"both layouts, {at}", 4 * n * d, both if DEVICE == "cuda" else twin, twin, x, one, E4M3
        )
    given, size = (normal(N, 4 * D), normal(N, 4 * D), one, one, "gelu"), 4 * N * D
    ours, twin = fp8_activation.hidden_to_fp8, fp8_activation.hidden_to_fp8_torch
    row("GELU", 3 * size, ours, twin, *given[1:3], "gelu")
    ours, twin = fp8_activation.gradients_to_fp8, fp8_activation.gradients_to_fp8_torch
    row("GELU's gradients", 7 * size, ours, twin, *given)
    return found


def products(N: int, D: int) -> Rows:
    """(n, k) · (m, k)ᵀ of every product of a layer, forward and backward; TFLOP/s beside µs."""
    found: Rows = {}
    maps = {"q, k, v": (3 * D, D), "out": (D, D), "up": (4 * D, D), "down": (D, 4 * D)}
    for name, (width, inner) in maps.items():
        shapes = {"": (N, width, inner), " dx": (N, inner, width), " dW": (width, inner, N)}
        for way, (n, m, k) in shapes.items():
            a, b = normal(n, k), normal(m, k)
            left, right = to_fp8(a, E5M2 if way else E4M3), to_fp8(b, E4M3)
            factors = (left.rows, right.rows, left.scale, right.scale, torch.bfloat16)
            row = {"bf16": us(F.linear, a, b), "8 bits": us(product, "input", *factors)}
            row["fast"] = us(product, "forward", *factors)
            tflops = {f"{key} TFLOP/s": 2e-6 * n * m * k / value for key, value in row.items()}
            found[name + way] = row | tflops
    return found


class Apart(torch.autograd.Function):
    """Each factor is measured, cast and transposed when it is needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        (x8, x_scale), (w8, w_scale) = cast(x, E4M3), cast(weight, E4M3)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        return product("forward", x8, w8, x_scale, w_scale, x.dtype)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        (x8, x_scale, w8, w_scale), (g8, scale) = ctx.saved_tensors, cast(dout, E5M2)
        dx = product("input", g8, w8.t().contiguous(), scale, w_scale, dout.dtype)
        turned = g8.t().contiguous(), x8.t().contiguous()
        return dx, product("weight", *turned, scale, x_scale, dout.dtype)


def cast(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    inverse, scale = scales(x.abs().amax().float(), dtype)
    return (x.float() * inverse).to(dtype), scale


def maps(N: int, D: int) -> Rows:
    """A layer's maps, forward and backward."""
    linear = {"bf16": F.linear, "8 bits, apart": Apart.apply, "8 bits": fp8_linear}
    both = {
        "bf16": dense_feed_forward,
        "8 bits, apart": lambda x, up, down: Apart.apply(F.gelu(Apart.apply(x, up)), down),
        "8 bits": lambda x, up, down: fp8_feed_forward(x, up, down, "gelu"),
    }
    cases = {"q, k, v": (linear, 3 * D), "out": (linear, D), "feed-forward": (both, 4 * D)}
    found: Rows = {}
    for name, (ways, width) in cases.items():
        weights = [(width, D), (D, width)][: 1 + (ways is both)]
        given = [normal(N, D), *(normal(*shape, scale=0.02) for shape in weights)]
        leaves = [part.requires_grad_() for part in given]
        dout = normal(N, weights[-1][0], scale=1e-4)
        found[name] = {}
        for way, f in ways.items():
            whole = compiled(f)
            step = lambda f: torch.autograd.grad(f(*leaves), leaves, dout)  # noqa: B023, E731
            found[name][way] = us(step, whole)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16_384 if DEVICE == "cuda" else 64)
    parser.add_argument("--width", type=int, default=2048 if DEVICE == "cuda" else 32)
    add_json_option(parser)
    options, console, results = parser.parse_args(), Console(width=120), {}
    if DEVICE == "cpu":
        console.print("No GPU here: a tiny shape in plain torch, to see that it runs.")
    for part in (passes, products, maps):
        results[part.__name__] = rows = part(options.tokens, options.width)
        table = Table(f"{part.__name__}, µs", *next(iter(rows.values())))
        for name, row in rows.items():
            table.add_row(name, *(f"{x:.2f}" if x < 100 else f"{x:.0f}" for x in row.values()))
        console.print(table)
        write_record(options.json, results)


if __name__ == "__main__":
    main()
