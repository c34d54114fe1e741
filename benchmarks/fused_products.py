"""The products around GELU with GELU inside them, beside cuBLAS and a pass of its own.

    python benchmarks/fused_products.py [--capacity 1 2] [--json FILE]

Eight experts of a sparse layer, 32,768 tokens, and one dense expert of 16,384 rows, which writes
its hidden rows again in the backward pass; d_model 2048, d_ff 8192, bf16. Both are checked against
each other, then timed in turns, so that a card that grows hot is hot for both. Needs a Hopper GPU:
elsewhere there is nothing to do.
"""

import argparse
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

import torch
from _record import add_json_option, write_record
from _timing import median_ms
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pyper.kernels.activation import activation_forward, activation_gradients
from pyper.kernels.gelu_products import down_gradient_gelu, fits, up_gelu

N, E, D, D_FF, DENSE_ROWS = 32_768, 8, 2048, 8192, 16_384
VARIANTS = ("bmm", "bmm and a pass", "GELU inside")
ROUNDS = 3


@dataclass
class Case:
    """Inputs of the products: experts that took `rows` tokens each, or one without gates."""

    experts: int
    rows: int
    gated: bool = True

    @cached_property
    def given(self) -> dict[str, Any]:
        draw = torch.Generator("cuda").manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            made = torch.randn(*shape, generator=draw, device="cuda", dtype=torch.bfloat16)
            return made.mul_(scale)

        n, many = max(N, self.rows), range(self.experts)
        order = [torch.randperm(n, generator=draw, device="cuda")[: self.rows] for _ in many]
        return {
            "rows": normal(self.experts, self.rows, D),
            "dy": normal(self.experts, self.rows, D),
            "up": normal(self.experts, D_FF, D, scale=D**-0.5),
            "down": normal(self.experts, D, D_FF, scale=D**-0.5),
            "gates": normal(n, self.experts).float().softmax(-1) if self.gated else None,
            "index": torch.stack(order) if self.gated else None,
        }

    @cached_property
    def pre(self) -> Tensor:
        return torch.bmm(self.given["rows"], self.given["up"].mT)

    def run(self, variant: str, backward: bool) -> tuple[Tensor, ...]:
        if variant == "GELU inside":
            return self.inside(backward)
        given, index, gates = self.given, self.given["index"], self.given["gates"]
        a, b = (given["dy"], given["down"]) if backward else (given["rows"], given["up"].mT)
        product = torch.bmm(a, b)
        if variant == "bmm":
            return (product,)
        if backward:
            again = not self.gated
            return activation_gradients(product, self.pre, "gelu", index, gates, again)
        return product, activation_forward(product, "gelu", index, gates)

    def inside(self, backward: bool) -> tuple[Tensor, ...]:
        given, around = self.given, (self.given["gates"], self.given["index"])
        if backward:
            again = not self.gated
            return down_gradient_gelu(given["dy"], given["down"], self.pre, *around, again)
        return up_gelu(given["rows"], given["up"], *around)

    def wrong_by(self, backward: bool) -> list[float]:
        """‖got − expected‖ / ‖expected‖ of all results."""
        pairs = zip(self.run(VARIANTS[2], backward), self.run(VARIANTS[1], backward), strict=True)
        return [
            ((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs if len(b)
        ]


@torch.no_grad()
def measured(case: Case, backward: bool) -> dict[str, dict[str, Any]]:
    """Of each variant; medians of rounds in which all take their turn."""
    errors, times = case.wrong_by(backward), {name: [] for name in VARIANTS}
    if not max(errors) < 1e-2:
        raise ValueError(f"wrong by {errors}")
    for _ in range(ROUNDS):
        for name in VARIANTS:
            times[name].append(median_ms(lambda _, name=name: case.run(name, backward), repeats=30))
    gflop = 2 * case.pre.numel() * D / 1e9
    rows = {name: {"ms": median(found)} for name, found in times.items()}
    for row in rows.values():
        row["tflops"] = gflop / row["ms"]
    rows["GELU inside"]["errors"] = errors
    return rows


def cases(capacities: list[int]) -> dict[str, Case]:
    sparse = {f"{E} experts, capacity {c}": Case(E, N * c // E) for c in capacities}
    return sparse | {f"dense, {DENSE_ROWS:,} rows": Case(1, DENSE_ROWS, gated=False)}


def usable() -> bool:
    if not torch.cuda.is_available():
        return False
    shapes = ((E, N // E, D), (E, D_FF, D), (E, D, D_FF))
    given = (torch.empty(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    return fits(*given, "gelu", None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capacity", type=int, nargs="+", default=[1, 2])
    add_json_option(parser)
    options = parser.parse_args()
    console = Console(width=120)
    if not usable():
        console.print("No Hopper GPU here, or not the Triton it was tried with: nothing to do.")
        return
    results: dict[str, Any] = {}
    for title, case in cases(options.capacity).items():
        table = Table("", "ms", "TFLOP/s", "errors", title=title)
        for way, backward in (("forward", False), ("backward", True)):
            results[f"{title}, {way}"] = rows = measured(case, backward)
            for name, row in rows.items():
                errors = " ".join(f"{error:.1e}" for error in row.get("errors", []))
                table.add_row(f"{way}: {name}", f"{row['ms']:.3f}", f"{row['tflops']:.0f}", errors)
        console.print(table)
    write_record(options.json, results)


if __name__ == "__main__":
    main()
