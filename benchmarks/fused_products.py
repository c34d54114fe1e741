"""The products around GELU with GELU inside them, beside cuBLAS and a pass of its own.

    python benchmarks/fused_products.py [--capacity 1 2] [--only WORDS] [--json FILE]

Eight experts of a sparse layer: 32,768 tokens, d_model 2048, d_ff 8192, bf16. Every variant is
compiled first, many at once, then checked against the separate passes and timed. They run in a
process of their own: one that fails or never ends is reported, and the others go on. The products
alone stand first and last, so that a card that grows hot shows. Without a GPU there is nothing
to do.
"""

import argparse
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing.connection import Connection
from typing import Any

import _fused_products as plain
import _overlapped_products as overlapped
import torch
from _record import add_json_option, write_record
from _timing import median_ms
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pyper.kernels.activation import activation_forward, activation_gradients

N, E, D, D_FF = 32_768, 8, 2048, 8192
PLANS = (*plain.TILES, *overlapped.PLANS)
SECONDS = 60
"""More than any variant takes, with the start of its process."""


@dataclass
class Case:
    """Inputs of the products, and what the separate passes make of them."""

    capacity: int
    n_tokens: int = N

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        C = self.n_tokens * self.capacity // E
        draw = torch.Generator("cuda").manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            made = torch.randn(*shape, generator=draw, device="cuda", dtype=torch.bfloat16)
            return made.mul_(scale)

        order = [torch.randperm(self.n_tokens, generator=draw, device="cuda")[:C] for _ in range(E)]
        return {
            "rows": normal(E, C, D),
            "dy": normal(E, C, D),
            "up": normal(E, D_FF, D, scale=D**-0.5),
            "down": normal(E, D, D_FF, scale=D**-0.5),
            "gates": normal(self.n_tokens, E).float().softmax(-1),
            "index": torch.stack(order),
        }

    @cached_property
    def pre(self) -> Tensor:
        return torch.bmm(self.inputs["rows"], self.inputs["up"].mT)

    def separate(self, backward: bool) -> tuple[Tensor, Tensor]:
        """As `up_gelu` and `down_gradient_gelu`: a product of cuBLAS, and a pass."""
        given, index, gates = self.inputs, self.inputs["index"], self.inputs["gates"]
        if not backward:
            pre = torch.bmm(given["rows"], given["up"].mT)
            return pre, activation_forward(pre, "gelu", index, gates)
        dhidden = torch.bmm(given["dy"], given["down"])
        dpre, dgates, _ = activation_gradients(dhidden, self.pre, "gelu", index, gates, False)
        return dpre, dgates

    def fused(self, plan: Any, backward: bool) -> tuple[Tensor, Tensor]:
        given, module = self.inputs, overlapped if isinstance(plan, overlapped.Plan) else plain
        around = (given["gates"], given["index"], plan)
        if backward:
            return module.down_gradient_gelu(given["dy"], given["down"], self.pre, *around)
        return module.up_gelu(given["rows"], given["up"], *around)

    def product(self, backward: bool) -> Tensor:
        given = self.inputs
        if backward:
            return torch.bmm(given["dy"], given["down"])
        return torch.bmm(given["rows"], given["up"].mT)


def jobs(only: list[str]) -> list[tuple[str, Any, bool]]:
    """Name, plan and direction; products and separate passes at both ends."""
    kinds = [("forward", False), ("backward", True)]
    ends = [
        (f"{way}: {name}", name, back) for way, back in kinds for name in ("bmm", "bmm and a pass")
    ]
    tried = [(f"{way}: {plan}", plan, back) for way, back in kinds for plan in PLANS]
    tried = [job for job in tried if all(word in job[0] for word in only)]
    return [*ends, *tried, *((f"{name}, again", plan, back) for name, plan, back in ends)]


def measured(case: Case, plan: Any, backward: bool) -> dict[str, Any]:
    def step(_: int) -> object:
        if plan == "bmm":
            return case.product(backward)
        return case.separate(backward) if plan == "bmm and a pass" else case.fused(plan, backward)

    errors = [] if isinstance(plan, str) else wrong_by(case, plan, backward)
    ms = median_ms(step, repeats=50)
    tflops = 2 * case.pre.numel() * D / ms / 1e9
    return {"ms": ms, "tflops": tflops, "errors": errors}


def wrong_by(case: Case, plan: Any, backward: bool) -> list[float]:
    """‖got − expected‖ / ‖expected‖ of both results."""
    got, expected = case.fused(plan, backward), case.separate(backward)
    if backward:
        expected = (expected[0], expected[1].T.gather(1, case.inputs["index"]))
    pairs = zip(got, expected, strict=True)
    return [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs]


def compiled(plan: Any, backward: bool) -> str:
    """Nothing, or why it does not compile."""
    try:
        small = Case(1, n_tokens=E * 256)
        small.fused(replace(plan, launch=False), backward)
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {error}".strip().splitlines()[-1][:200]


def compile_all(todo: list[tuple[str, Any, bool]]) -> dict[str, str]:
    """What fails, with the reason."""
    tried = [job for job in todo if not isinstance(job[1], str)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 12), mp_context=context) as pool:
        asked = [(name, pool.submit(compiled, plan, back)) for name, plan, back in tried]
        said = {name: future.result() for name, future in asked}
    return {name: why for name, why in said.items() if why}


def serve(pipe: Connection, capacity: int, todo: list[tuple[str, Any, bool]]) -> None:
    """In a process of its own: the numbers of each job, until one breaks the device."""
    case = Case(capacity)
    for _, plan, backward in todo:
        try:
            with torch.no_grad():
                pipe.send(measured(case, plan, backward))
        except Exception as error:
            said = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            pipe.send({"failed": said, "lost": device_lost()})


def device_lost() -> bool:
    """After some errors a process cannot use its GPU any more."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def measure_all(
    capacity: int, todo: list[tuple[str, Any, bool]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each job's numbers; after one that hangs or kills its process, a new process goes on."""
    context = multiprocessing.get_context("spawn")
    while todo:
        here, there = context.Pipe()
        child = context.Process(target=serve, args=(there, capacity, todo))
        child.start()
        there.close()
        while todo:
            silent = {"failed": f"nothing in {SECONDS} s, or the process died", "lost": True}
            said = _received(here) or silent
            yield todo[0][0], said
            todo = todo[1:]
            if said.get("lost"):
                break
        child.kill()
        child.join()


def _received(pipe: Connection) -> dict[str, Any] | None:
    try:
        return pipe.recv() if pipe.poll(SECONDS) else None
    except EOFError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capacity", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", default=[], help="words in the names of variants")
    add_json_option(parser)
    options = parser.parse_args()
    console = Console(width=120)
    results: dict[str, Any] = {}
    if not torch.cuda.is_available():
        console.print("No GPU here: nothing to do.")
        return
    todo = jobs(options.only)
    broken = compile_all(todo)
    for name, why in broken.items():
        console.print(f"{name} does not compile: {why}", markup=False)
    todo = [job for job in todo if job[0] not in broken]
    for capacity in options.capacity:
        results[f"capacity {capacity}"] = rows = {}
        table = Table("", "ms", "TFLOP/s", "errors", title=f"Capacity {capacity}")
        for name, row in measure_all(capacity, todo):
            rows[name] = row
            table.add_row(name, *_cells(row))
        console.print(table)
    write_record(options.json, results | {"does not compile": broken})


def _cells(row: dict[str, Any]) -> list[str]:
    if "failed" in row:
        return ["", "", str(row["failed"])]
    errors = " ".join(f"{error:.1e}" for error in row["errors"])
    return [f"{row['ms']:.3f}", f"{row['tflops']:.0f}", errors]


if __name__ == "__main__":
    main()
