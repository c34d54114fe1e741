"""The products of a decoding step beside the library's: microseconds, and share of the memory.

    python benchmarks/thin_linear.py [--json FILE] [--batches 1 4 16 64] [--width 2048] [--sweep]

The four products of a layer of `8x1b5` with what stands around them (norm, GELU, residual), weights
in bf16, int8 and fp8. The peer is the same in plain torch: cuBLAS and its neighbours, bf16. Weights
are read cold, as in decoding: copies beyond the cache take turns inside one recorded graph. The
share is the weights' bytes a second of what the card copies a second. "apart": each kernel waits
for the one before it, instead of beginning early. `--sweep` tries block shapes (built in parallel
first) and prints the best of each product. Without a GPU: tiny shapes, to see that it runs.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from typing import Any
from unittest import mock

import torch
from _record import add_json_option, write_record
from _timing import as_graph, copied_bytes_per_second, median_ms
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from pyper.generate.narrow_weights import NarrowLinear, thin_weight
from pyper.kernels import InputNorm, ThinWeight, row_linear, thin_linear, thin_linear_torch
from pyper.stages.context import available_cores

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
STORED = ("bf16", "int8", "fp8")
NORM, RESIDUAL = {"norm": True}, {"residual": True}
PRODUCTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "qkv": (3, 1, NORM),
    "out": (1, 1, RESIDUAL),
    "up": (4, 1, NORM | {"activation": "gelu"}),
    "down": (1, 4, RESIDUAL),
    "head": (16, 1, NORM),
}
"""Outputs and inputs of the products of a layer, in widths, and what stands around them."""
COLD_BYTES = 400_000_000 if GPU else 1
SWEEP_ONE = ((1, 2, 4, 8), (256, 512), (1, 2, 4))
"""Of one row: outputs of a block, words of four bytes of a weight row, warps."""
SWEEP_FEW = ((16, 32, 64), (128, 256), (3, 4), (4, 8))
"""Of several: outputs and inputs of a block, stages, warps."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64] if GPU else [2])
    parser.add_argument("--width", type=int, default=2048 if GPU else 32)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--products", nargs="+", choices=PRODUCTS, default=list(PRODUCTS))
    parser.add_argument("--stored", nargs="+", choices=STORED, default=list(STORED))
    add_json_option(parser)
    return parser.parse_args()


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


def microseconds(
    function: Callable[..., Tensor], x: Tensor, copies: list[ThinWeight], options: dict[str, Any]
) -> float:
    def step(_: int) -> None:
        for weight in copies:
            function(x, weight, **options)

    return 1e3 * median_ms(as_graph(step) if GPU else step, repeats=20 if GPU else 2) / len(copies)


def check(x: Tensor, weight: ThinWeight, options: dict[str, Any]) -> None:
    ours, reference = (f(x, weight, **options).float() for f in (overlapped, thin_linear_torch))
    off = ((ours - reference).norm() / reference.norm()).item()
    assert off < 0.02, f"the kernel is off by {off:.2%}"


def sweep(
    x: Tensor, copies: list[ThinWeight], options: dict[str, Any]
) -> list[tuple[float, tuple[int, ...]]]:
    """Microseconds of every block shape that builds, best first."""
    found = []
    for shape in shapes(len(x)):
        with blocks(len(x), shape):
            try:
                found.append((microseconds(overlapped, x, copies, options), shape))
            except Exception:  # too much shared memory, or no such product
                continue
    return sorted(found)


def shapes(batch: int) -> list[tuple[int, ...]]:
    return list(itertools.product(*(SWEEP_ONE if batch == 1 else SWEEP_FEW)))


@contextmanager
def blocks(batch: int, shape: tuple[int, ...]) -> Iterator[None]:
    """Kernels in this block shape."""
    module = row_linear if batch == 1 else sys.modules[thin_linear.__module__]
    with mock.patch.object(module, "_blocks", return_value=shape):
        yield


def build(job: tuple[str, int, int, str, tuple[int, ...]]) -> None:
    """Run once, so that the kernel is in Triton's cache; it is what takes the time."""
    name, batch, width, stored, shape = job
    n_out, n_in, around = PRODUCTS[name]
    x, options = inputs(batch, n_out * width, n_in * width, around)
    with blocks(batch, shape), suppress(Exception):
        overlapped(x, weights(n_out * width, n_in * width, stored, 0)[0], **options)


def build_all(args: argparse.Namespace) -> None:
    jobs = [
        (name, batch, args.width, stored, shape)
        for name, batch, stored in itertools.product(args.products, args.batches, args.stored)
        for shape in shapes(batch)
    ]
    with ProcessPoolExecutor(max(1, available_cores() - 1), get_context("spawn")) as pool:
        list(pool.map(build, jobs, chunksize=4))


def overlapped(x: Tensor, weight: ThinWeight, **options: Any) -> Tensor:
    """As decoding calls it."""
    return thin_linear(x, weight, **options, overlap=True)


@torch.no_grad()
def row_of(
    args: argparse.Namespace, bandwidth: float, name: str, batch: int, console: Console
) -> dict[str, Any]:
    n_out, n_in, around = PRODUCTS[name]
    shape = (n_out * args.width, n_in * args.width)
    x, options = inputs(batch, *shape, around)
    row: dict[str, Any] = {}
    for stored in args.stored:
        copies = weights(*shape, stored, COLD_BYTES)
        check(x, copies[0], options)
        if stored == "bf16":
            row["torch"] = microseconds(thin_linear_torch, x, copies, options)
            row["apart"] = microseconds(thin_linear, x, copies, options)
        row[stored] = microseconds(overlapped, x, copies, options)
        row[f"{stored} share"] = copies[0].weight.nbytes / (row[stored] / 1e6) / bandwidth
        if args.sweep:
            best = row[f"{stored} sweep"] = sweep(x, copies, options)
            shown = [(round(t, 1), s) for t, s in best[:3]]
            console.print(name, batch, stored, f"{row[stored]:.1f}", shown)
    return row


def main() -> None:
    args, console = parse(), Console(width=130)
    if args.sweep:
        build_all(args)
    bandwidth = copied_bytes_per_second()
    console.print(f"copies {bandwidth / 1e12:.2f} TB/s")
    columns = ["torch", "apart", *args.stored, *(f"{s} share" for s in args.stored)]
    table = Table("µs of a product", "batch", *columns)
    results: dict[str, Any] = {}
    for name, batch in itertools.product(args.products, args.batches):
        row = results[f"{name} {batch}"] = row_of(args, bandwidth, name, batch, console)
        table.add_row(name, str(batch), *(f"{row.get(c, 0):.3g}" for c in columns))
        write_record(args.json, {"bytes_per_second": bandwidth, "rows": results})
    console.print(table)


if __name__ == "__main__":
    main()
