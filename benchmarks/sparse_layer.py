"""A whole sparse layer, forward and backward, beside its bare products and its peers.

    python benchmarks/sparse_layer.py [--json FILE] [--stages] [--capacity 1 2] [--tokens 32768]

Ours is checked against float64 before anything is timed. The ratio is the time of the batched
products alone divided by the row's. `--stages` times every part on its own. Without a GPU it runs
a tiny shape on the CPU, where the numbers say nothing about speed.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from _record import add_json_option, write_record
from _sparse_peers import (
    QUOTED,
    bare_products,
    grouped_token_choice,
    plain_expert_choice,
    with_gelu,
)
from _sparse_stages import stages
from _timing import Step, as_graph, measure
from torch import Tensor

from pyper.kernels import (
    combine_rows_torch,
    expert_choice_layer,
    expert_feed_forward_torch,
    gather_rows_torch,
    router_gates_torch,
)

ON_GPU = torch.cuda.is_available()
TABLE_SHAPE = {"tokens": 32_768, "d_model": 2048, "d_ff": 8192, "experts": 8}
TINY_SHAPE = {"tokens": 256, "d_model": 32, "d_ff": 64, "experts": 4}


class Inputs:
    """Random tokens (two sets, which take turns), weights, and gradients of the output."""

    def __init__(self, args: argparse.Namespace, capacity_factor: float) -> None:
        N, D, d_ff, E = args.tokens, args.d_model, args.d_ff, args.experts
        self.capacity = int(capacity_factor * N / E)
        self.device = torch.device("cuda" if ON_GPU else "cpu")
        self.dtype = torch.bfloat16 if ON_GPU else torch.float32
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.x = [self._random(N, D) for _ in range(2)]
        self.rows = [self._random(E, self.capacity, D) for _ in range(2)]
        self.router = self._random(E, D, scale=D**-0.5, dtype=torch.float32)
        self.up = self._random(E, d_ff, D, scale=D**-0.5)
        self.down = self._random(E, D, d_ff, scale=d_ff**-0.5)
        self.dout = self._random(N, D, leaf=False)
        self.drows = self._random(E, self.capacity, D, leaf=False)

    def _random(
        self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None, leaf: bool = True
    ) -> Tensor:
        draws = torch.randn(*shape, generator=self.generator, device=self.device) * scale
        return draws.to(dtype or self.dtype).requires_grad_(leaf)

    def on_rows(self, layer: Callable[..., Tensor]) -> Step:
        """Forward and backward of what needs no routing."""

        def step(i: int) -> object:
            given = (self.rows[i % 2], self.up, self.down)
            return torch.autograd.grad(layer(*given), given, self.drows)

        return step

    def on_tokens(self, layer: Callable[..., Tensor], *options: Any) -> Step:
        """Forward and backward of a whole layer."""

        def step(i: int) -> object:
            given = (self.x[i % 2], self.router, self.up, self.down)
            return torch.autograd.grad(layer(*given, *options), given, self.dout)

        return step


def pyper(
    x: Tensor,
    router: Tensor,
    up: Tensor,
    down: Tensor,
    capacity: int,
    recompute: bool = False,
) -> Tensor:
    return expert_choice_layer(x, None, router, up, down, capacity, recompute=recompute).out


def check(inputs: Inputs) -> dict[str, float]:
    """‖ours − reference‖ / ‖reference‖ of output and gradients, in float64 for the same choice."""
    given = (inputs.x[0], inputs.router, inputs.up, inputs.down)
    output = expert_choice_layer(given[0], None, *given[1:], inputs.capacity)
    ours = [output.out, *torch.autograd.grad(output.out, given, inputs.dout)]
    choice = output.choice
    x, router, up, down = exact = [t.detach().double().requires_grad_() for t in given]
    _, gates = router_gates_torch(x, router)
    rows = gather_rows_torch(x, choice.token_index, choice.slots)
    y = expert_feed_forward_torch(rows, choice.token_index, gates, up, down)
    out = combine_rows_torch(y, choice.token_index, choice.slots)
    reference = [out, *torch.autograd.grad(out, exact, inputs.dout.double())]
    names = ("out", "dx", "drouter", "dup", "ddown")
    errors = {
        name: ((a.double() - b).norm() / b.norm()).item()
        for name, a, b in zip(names, ours, reference, strict=True)
    }
    if not all(error < (1e-2 if ON_GPU else 1e-5) for error in errors.values()):
        raise SystemExit(f"wrong results, nothing was timed: {errors}")
    return errors


def candidates(inputs: Inputs, capacity_factor: float) -> dict[str, Callable[[], Step]]:
    """Rows of the table, each made when its turn comes."""
    capacity, k = inputs.capacity, max(1, round(capacity_factor))
    rows: dict[str, Callable[[], Step]] = {
        "batched products only": lambda: inputs.on_rows(bare_products),
        "… with GELU": lambda: inputs.on_rows(with_gelu),
        "plain torch": lambda: inputs.on_tokens(plain_expert_choice, capacity),
        "Pyper": lambda: inputs.on_tokens(pyper, capacity),
        "Pyper, recomputing": lambda: inputs.on_tokens(pyper, capacity, True),
    }
    if ON_GPU:
        compiled = {
            "… with GELU, compiled": lambda: inputs.on_rows(_compiled(with_gelu)),
            "plain torch, compiled": lambda: inputs.on_tokens(
                _compiled(plain_expert_choice), capacity
            ),
            "grouped_mm, token choice": lambda: inputs.on_tokens(grouped_token_choice, k),
            "grouped_mm, token choice, compiled": lambda: inputs.on_tokens(
                _compiled(grouped_token_choice), k
            ),
            "Pyper, compiled": lambda: inputs.on_tokens(_compiled(pyper), capacity),
            "Pyper, CUDA graph": lambda: as_graph(inputs.on_tokens(pyper, capacity)),
        }
        rows |= compiled
    return rows


def _compiled(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(layer, dynamic=False)


def table(args: argparse.Namespace, capacity_factor: float) -> dict[str, Any]:
    """Measure and print all rows for one capacity factor."""
    inputs = Inputs(args, capacity_factor)
    shape = ", ".join(f"{getattr(args, key):,} {key}" for key in TABLE_SHAPE)
    print(f"\ncapacity factor {capacity_factor:g}: {shape}, {inputs.dtype}")
    errors = check(inputs)
    print("errors against float64: " + ", ".join(f"{k} {v:.1e}" for k, v in errors.items()))
    print(f"{'forward + backward':<36}{'ms':>9}{'ratio':>7}{'peak GB':>9}")
    results: dict[str, Any] = {}
    for name, make in candidates(inputs, capacity_factor).items():
        row = results[name] = measure(make, args.repeats)
        base = results["batched products only"].get("ms")
        if "ms" in row and base:
            row["ratio"] = base / row["ms"]
        print_row(name, row)
        torch.compiler.reset()
    again = measure(candidates(inputs, capacity_factor)["batched products only"], args.repeats)
    results["batched products only, again"] = again
    print_row("batched products only, again", again)
    if all(getattr(args, key) == value for key, value in TABLE_SHAPE.items()):
        for name, ms in QUOTED.get(capacity_factor, {}).items():
            print(f"{name + ' (quoted, H200)':<36}{ms:>9.2f}")
    found = {"errors": errors, "rows": results}
    return found | ({"stages": print_stages(inputs, args.repeats)} if args.stages else {})


def print_row(name: str, row: dict[str, Any]) -> None:
    if "failed" in row:
        print(f"{name:<36}  {row['failed']}", flush=True)
        return
    ratio = f"{row['ratio']:>7.2f}" if "ratio" in row else " " * 7
    peak = f"{row['peak_gb']:>9.2f}" if row["peak_gb"] is not None else ""
    print(f"{name:<36}{row['ms']:>9.3f}{ratio}{peak}", flush=True)


def print_stages(inputs: Inputs, repeats: int) -> list[dict[str, Any]]:
    """Every part on its own, with what it reaches."""
    print(f"{'part':<46}{'ms':>9}{'TB/s':>9}{'TFLOP/s':>9}")
    rows = []
    for stage in stages(inputs.x[0], inputs.router, inputs.up, inputs.down, inputs.capacity):
        row = measure(lambda stage=stage: stage.step, repeats)
        if "ms" in row:
            row |= {"tb_s": stage.gb / row["ms"], "tflop_s": stage.gflop / row["ms"]}
            counted = "".join(f"{row[k]:>9.2f}" if row[k] else " " * 9 for k in ("tb_s", "tflop_s"))
            print(f"{stage.name:<46}{row['ms']:>9.3f}{counted}", flush=True)
        else:
            print_row(stage.name, row)
        rows.append({"part": stage.name} | row)
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for key, value in (TABLE_SHAPE if ON_GPU else TINY_SHAPE).items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--capacity", type=float, nargs="+", default=[1.0, 2.0], help="factors")
    parser.add_argument("--stages", action="store_true", help="time every part on its own too")
    parser.add_argument("--repeats", type=int, default=30 if ON_GPU else 3)
    add_json_option(parser)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if not ON_GPU:
        print("No GPU here: a tiny shape on the CPU, which runs the twins in plain torch.")
    write_record(args.json, {f"capacity {c:g}": table(args, c) for c in args.capacity})


if __name__ == "__main__":
    main()
