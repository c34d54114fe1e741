"""The products of a decoding step beside the library's: microseconds, and share of the memory.

    python benchmarks/thin_linear.py [--json FILE] [--batches 1 4 16 64] [--width 2048] [--sweep]

The four products of a layer of `8x1b5` with what stands around them (norm, GELU, residual), weights
in bf16, int8 and fp8. The peer is the same in plain torch: cuBLAS and its neighbours, bf16. Weights
are read cold, as in decoding: copies beyond the cache take turns inside one recorded graph. The
share is the weights' bytes a second of what the card copies a second. "apart": each kernel waits
for the one before it, instead of beginning early. "layer": the four one after another, as decoding
calls them, without attention. `--sweep` tries block shapes (built in parallel first) and prints the
best of each product, and the ways of whole layers. Without a GPU: tiny shapes, to see that it runs.
"""

import argparse
import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from typing import Any

import torch
from _record import add_json_option, write_record
from _thin_products import (
    GPU,
    PRODUCTS,
    Layer,
    as_decoding,
    inputs,
    layer_as_decoding,
    layers,
    torch_layer,
    weights,
)
from _thin_ways import WAYS, blocks, changed, computed
from _timing import as_graph, copied_bytes_per_second, median_ms
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pyper.kernels import ThinWeight, thin_linear_torch
from pyper.kernels.launch import block_of
from pyper.kernels.thin_blocks import Blocks
from pyper.stages.context import available_cores

STORED = ("bf16", "int8", "fp8")
COLD_BYTES = 400_000_000 if GPU else 1
PARTS = 4
"""Of the shapes of a product, built side by side."""
SWEEP_ONE = ((1, 2, 4, 8), (256, 512), (1, 2, 4), (True,), (False, True))
"""Of one row: as `RowBlocks`."""
SWEEP_INT8 = ((4, 8, 16), (256, 512, 1024, 2048), (1, 2, 4, 8, 16), (False,), (False, True))
SWEEP_FEW = (
    *((64, inputs, stages, 4) for inputs, stages in ((64, 6), (128, 3), (128, 5))),
    *((128, inputs, stages, 4) for inputs, stages in ((64, 4), (128, 3))),
    (128, 64, 6, 8),
)
"""Of several: outputs and inputs of a block, stages, warps; and how many programs share inputs."""
SWEEP_SPLITS = (1, 2, 4, 8)
LAYER_OF_ONE: dict[str, dict[str, Any]] = {
    "early": {"early": True},
    "evicted": {"eviction": "evict_first"},
    "both": {"early": True, "eviction": "evict_first"},
}
"""Of one row, other than usual; tried in whole layers."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64] if GPU else [2])
    parser.add_argument("--width", type=int, default=2048 if GPU else 32)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--products", nargs="+", choices=PRODUCTS, default=list(PRODUCTS))
    parser.add_argument("--stored", nargs="+", choices=STORED, default=list(STORED))
    add_json_option(parser)
    return parser.parse_args()


def microseconds(
    function: Callable[..., Tensor], x: Tensor, copies: Sequence[Any], options: dict[str, Any]
) -> float:
    def step(_: int) -> None:
        for weight in copies:
            function(x, weight, **options)

    return 1e3 * median_ms(as_graph(step) if GPU else step, repeats=20 if GPU else 2) / len(copies)


def check(x: Tensor, weight: ThinWeight, options: dict[str, Any]) -> None:
    kernel = as_decoding(x, options)
    ours, reference = (f(x, weight, **options).float() for f in (kernel, thin_linear_torch))
    off = ((ours - reference).norm() / reference.norm()).item()
    assert off < 0.02, f"the kernel is off by {off:.2%}"


def sweep(
    x: Tensor, copies: list[ThinWeight], options: dict[str, Any]
) -> list[tuple[float, tuple[Any, ...]]]:
    """Microseconds of every block shape that builds, best first."""
    found, kernel = [], as_decoding(x, options)
    for shape in shapes(len(x), copies[0]):
        with blocks(len(x), shape):
            try:
                check(x, copies[0], options)
                found.append((microseconds(kernel, x, copies, options), shape))
            except Exception:  # too much shared memory, or no such product
                continue
    return sorted(found)


def shapes(batch: int, weight: ThinWeight) -> list[tuple[Any, ...]]:
    if batch == 1:
        return shapes_of_one(weight)
    found: list[tuple[Any, ...]] = []
    for (outputs, depth, stages, warps), splits in itertools.product(SWEEP_FEW, SWEEP_SPLITS):
        programs = len(weight.weight) // outputs * splits
        if splits == 1 or 64 <= programs <= 300:  # neither idle processors nor two rounds
            found.append(Blocks(outputs, depth, splits, stages, warps))
    return found


def shapes_of_one(weight: ThinWeight) -> list[tuple[int, ...]]:
    widened = list(itertools.product(*SWEEP_ONE))
    if weight.weight.dtype != torch.int8:
        return widened
    longest = block_of(weight.weight.shape[1] // 4, 1 << 20)
    found: list[tuple[int, ...]] = [(4, 512, 4, True), (8, 256, 2, True)]
    for outputs, words, warps, *rest in itertools.product(*SWEEP_INT8):
        held = outputs * words // (32 * warps)  # by a thread, of a block's words
        if words <= longest and words >= 128 * warps and 8 <= held <= 128:
            found.append((outputs, words, warps, *rest))
    return found


def build(job: tuple[str, int, int, str, int]) -> None:
    """Run some shapes once, so that they are in Triton's cache; it is what takes the time."""
    name, batch, width, stored, part = job
    if name == "layer":
        x, layer = inputs(batch, width, width, {})[0], layers(width, stored, 0)[0]
        for way in [*WAYS.values()][part::PARTS]:
            with computed(**way), suppress(Exception):
                layer_as_decoding(x)(x, layer)
        return
    n_out, n_in, around = PRODUCTS[name]
    x, options = inputs(batch, n_out * width, n_in * width, around)
    weight = weights(n_out * width, n_in * width, stored, 0)[0]
    for shape in shapes(batch, weight)[part::PARTS]:
        with blocks(batch, shape), suppress(Exception):
            as_decoding(x, options)(x, weight, **options)


def build_all(args: argparse.Namespace) -> None:
    # Batches that fill the same block are the same kernels.
    batches = {1 if batch == 1 else max(block_of(batch, 64), 16): batch for batch in args.batches}
    every = itertools.product(
        [*args.products, "layer"], batches.values(), args.stored, range(PARTS)
    )
    jobs = [(name, batch, args.width, stored, part) for name, batch, stored, part in every]
    with ProcessPoolExecutor(max(1, available_cores() - 1), get_context("spawn")) as pool:
        list(pool.map(build, jobs))


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
            apart = as_decoding(x, options, overlap=False)
            row["apart"] = microseconds(apart, x, copies, options)
        row[stored] = microseconds(as_decoding(x, options), x, copies, options)
        row[f"{stored} share"] = copies[0].weight.nbytes / (row[stored] / 1e6) / bandwidth
        if args.sweep:
            best = row[f"{stored} sweep"] = sweep(x, copies, options)
            shown = [(round(t, 1), s) for t, s in best[:3]]
            console.print(name, batch, stored, f"{row[stored]:.1f}", shown)
    return row


def microseconds_of_way(way: dict[str, int], x: Tensor, copies: list[Layer]) -> float:
    """Of a layer; not a number where it does not run."""
    kernels = layer_as_decoding(x)
    try:
        with computed(**way):
            ours, reference = kernels(x, copies[0]).float(), torch_layer(x, copies[0]).float()
            off = ((ours - reference).norm() / reference.norm()).item()
            assert off < 0.03, off
            return microseconds(kernels, x, copies, {})
    except Exception as error:
        print(way, repr(error)[:200])
        return math.nan


@torch.no_grad()
def row_of_layer(
    args: argparse.Namespace, bandwidth: float, batch: int, console: Console
) -> dict[str, Any]:
    row: dict[str, Any] = {}
    x, _ = inputs(batch, args.width, args.width, {})
    for stored in args.stored:
        copies = layers(args.width, stored, COLD_BYTES)
        nbytes = sum(w.weight.nbytes for w in copies[0])
        if stored == "bf16":
            row["torch"] = microseconds(torch_layer, x, copies, {})
        row[stored] = microseconds(layer_as_decoding(x), x, copies, {})
        row[f"{stored} share"] = nbytes / (row[stored] / 1e6) / bandwidth
        for name, way in WAYS.items() if args.sweep and batch > 1 else ():
            row[f"{stored} {name}"] = microseconds_of_way(way, x, copies)
        if args.sweep and batch == 1:
            for name, changes in LAYER_OF_ONE.items():
                with changed(**changes):
                    row[f"{stored} {name}"] = microseconds(layer_as_decoding(x), x, copies, {})
    console.print("layer", batch, {name: round(value, 2) for name, value in row.items()})
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
    for name, batch in itertools.product([*args.products, "layer"], args.batches):
        if name == "layer":
            row = row_of_layer(args, bandwidth, batch, console)
        else:
            row = row_of(args, bandwidth, name, batch, console)
        results[f"{name} {batch}"] = row
        table.add_row(name, str(batch), *(f"{row.get(c, 0):.3g}" for c in columns))
        write_record(args.json, {"bytes_per_second": bandwidth, "rows": results})
    console.print(table)


if __name__ == "__main__":
    main()
