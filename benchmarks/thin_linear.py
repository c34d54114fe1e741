"""The products of a decoding step beside the library's: microseconds, and share of the memory.

    python benchmarks/thin_linear.py [--json FILE] [--batches 1 4 16 64] [--width 2048] [--sweep]

The four products of a layer of `8x1b5` with what stands around them (norm, GELU, residual), weights
in bf16, int8 and fp8. The peer is the same in plain torch: cuBLAS and its neighbours, bf16. Weights
are read cold, as in decoding: copies beyond the cache take turns inside one recorded graph. The
share is the weights' bytes a second of what the card copies a second. `--sweep` tries block shapes
and prints the best of each product. Without a GPU: tiny shapes, to see that it runs.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _record import add_json_option, write_record
from _timing import as_graph, copied_bytes_per_second, median_ms
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from pyper.generate.narrow_weights import NarrowLinear, thin_weight
from pyper.kernels import InputNorm, ThinWeight, thin_linear, thin_linear_torch
from pyper.kernels import thin_linear as _function

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
STORED = ("bf16", "int8", "fp8")
COLD_BYTES = 400_000_000 if GPU else 1
SWEEP = ((8, 16, 32, 64), (64, 128, 256, 512), (2, 3, 4, 6), (2, 4, 8))
"""Outputs and inputs of a block, stages, warps."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64] if GPU else [2])
    parser.add_argument("--width", type=int, default=2048 if GPU else 32)
    parser.add_argument("--sweep", action="store_true")
    add_json_option(parser)
    return parser.parse_args()


def products(width: int) -> dict[str, tuple[int, int, dict[str, Any]]]:
    """Outputs, inputs and what stands around each product of a layer."""
    norm, residual = {"norm": True}, {"residual": True}
    return {
        "qkv": (3 * width, width, norm),
        "out": (width, width, residual),
        "up": (4 * width, width, norm | {"activation": "gelu"}),
        "down": (width, 4 * width, residual),
        "head": (16 * width, width, norm),
    }


def weights(n_out: int, n_in: int, stored: str) -> list[ThinWeight]:
    """As many copies as no cache holds."""
    linear = nn.Linear(n_in, n_out, bias=False, device=DEVICE, dtype=torch.bfloat16)
    kept = linear if stored == "bf16" else NarrowLinear(linear, stored)
    first = thin_weight(kept)
    n = COLD_BYTES // first.weight.nbytes + 1
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
    ours, reference = (f(x, weight, **options).float() for f in (thin_linear, thin_linear_torch))
    off = ((ours - reference).norm() / reference.norm()).item()
    assert off < 0.02, f"the kernel is off by {off:.2%}"


def sweep(
    x: Tensor, copies: list[ThinWeight], options: dict[str, Any]
) -> Iterator[tuple[float, Any]]:
    """Microseconds of every block shape that builds, best first."""
    module = _module()
    usual, found = module._blocks, []
    try:
        for shape in itertools.product(*SWEEP):
            module._blocks = lambda *_, shape=shape: shape
            try:
                found.append((microseconds(thin_linear, x, copies, options), shape))
            except Exception:  # too much shared memory, or no such product
                continue
    finally:
        module._blocks = usual
    yield from sorted(found)


def _module() -> Any:
    import sys

    return sys.modules[_function.__module__]


@torch.no_grad()
def main() -> None:
    args, console = parse(), Console()
    bandwidth = copied_bytes_per_second()
    console.print(f"copies {bandwidth / 1e12:.2f} TB/s")
    table = Table(
        "product",
        "batch",
        "torch µs",
        *(f"{s} µs" for s in STORED),
        *(f"{s} share" for s in STORED),
    )
    results: dict[str, Any] = {}
    for (name, (n_out, n_in, around)), batch in itertools.product(
        products(args.width).items(), args.batches
    ):
        x, options = inputs(batch, n_out, n_in, around)
        row: dict[str, Any] = {}
        for stored in STORED:
            copies = weights(n_out, n_in, stored)
            check(x, copies[0], options)
            if stored == "bf16":
                row["torch"] = microseconds(thin_linear_torch, x, copies, options)
            row[stored] = microseconds(thin_linear, x, copies, options)
            row[f"{stored} share"] = copies[0].weight.nbytes / (row[stored] / 1e6) / bandwidth
            if args.sweep:
                best = list(sweep(x, copies, options))[:3]
                row[f"{stored} best"] = best
                console.print(
                    name, batch, stored, f"{row[stored]:.1f}", [(round(t, 1), s) for t, s in best]
                )
            del copies
        results[f"{name} {batch}"] = row
        cells = [row["torch"], *(row[s] for s in STORED), *(row[f"{s} share"] for s in STORED)]
        table.add_row(name, str(batch), *(f"{c:.3g}" for c in cells))
        write_record(args.json, {"bytes_per_second": bandwidth, "rows": results})
    console.print(table)


if __name__ == "__main__":
    main()
