"""The head and its loss, forward and backward: ours in chunks beside compiled cross-entropy.

    python benchmarks/head_loss.py [--json FILE] [--tokens 16384] [--vocabulary 32768]

Prints milliseconds and the memory needed beyond states and weight. Ours is checked against float64
before anything is timed. Liger takes part where it is installed. Without a GPU it runs a tiny shape
on the CPU, where the numbers say nothing about speed.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _record import add_json_option, write_record
from _timing import Step, as_graph, measure
from torch import Tensor

from pyper.kernels import linear_cross_entropy

ON_GPU = torch.cuda.is_available()
TABLE_SHAPE = {"tokens": 16_384, "d_model": 2048, "vocabulary": 32_768}
TINY_SHAPE = {"tokens": 128, "d_model": 32, "vocabulary": 300}
QUOTED = {"compiled cross-entropy": (10.8, 1.3), "Liger": (11.8, 0.27), "recomputing": (16.0, 0.47)}
"""Milliseconds and GB, measured earlier on one H200 (torch 2.11, Triton 3.6) at this shape."""


class Inputs:
    """Random states (two sets, which take turns), head and targets."""

    def __init__(self, args: argparse.Namespace) -> None:
        device = torch.device("cuda" if ON_GPU else "cpu")
        dtype = torch.bfloat16 if ON_GPU else torch.float32
        generator = torch.Generator(device).manual_seed(0)
        shapes = [(args.tokens, args.d_model)] * 2 + [(args.vocabulary, args.d_model)]
        draws = [torch.randn(*shape, generator=generator, device=device) for shape in shapes]
        draws[2] *= args.d_model**-0.5
        *self.states, self.head = (d.to(dtype).requires_grad_() for d in draws)
        self.targets = torch.randint(
            args.vocabulary, (args.tokens,), generator=generator, device=device
        )

    def step(self, loss: Callable[..., Tensor], *options: Any) -> Step:
        """Mean loss, and the gradients of states and head."""

        def step(i: int) -> object:
            given = (self.states[i % 2], self.head)
            total = loss(*given, self.targets, *options)
            return torch.autograd.grad(total / len(self.targets), given)

        return step


def plain(states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(states, head).float(), targets, reduction="sum")


def pyper(states: Tensor, head: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    return linear_cross_entropy(states, head, targets, chunk_tokens=chunk)


def liger() -> Callable[..., Tensor]:
    """Its fused loss; raises ImportError where it is not installed."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda states, head, targets: loss(head, states, targets)


def check(inputs: Inputs) -> dict[str, float]:
    """‖ours − reference‖ / ‖reference‖ in float64, on at most 1,024 tokens in four chunks."""
    n = min(1024, len(inputs.targets))
    targets = inputs.targets[:n]
    given = [t.detach().requires_grad_() for t in (inputs.states[0][:n], inputs.head)]
    exact = [t.detach().double().requires_grad_() for t in given]
    ours, reference = pyper(*given, targets, n // 4), plain_exact(*exact, targets)
    errors = {"loss": ((ours.double() - reference).abs() / reference).item()}
    grads = (torch.autograd.grad(ours, given), torch.autograd.grad(reference, exact))
    for name, a, b in zip(("dstates", "dhead"), *grads, strict=True):
        errors[name] = ((a.double() - b).norm() / b.norm()).item()
    if not all(error < (1e-2 if ON_GPU else 1e-5) for error in errors.values()):
        raise SystemExit(f"wrong results, nothing was timed: {errors}")
    return errors


def plain_exact(states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(states, head), targets, reduction="sum")


def candidates(inputs: Inputs) -> dict[str, Callable[[], Step]]:
    """Rows of the table, each made when its turn comes."""
    rows: dict[str, Callable[[], Step]] = {
        "plain cross-entropy": lambda: inputs.step(plain),
        "Pyper": lambda: inputs.step(pyper),
    }
    if not ON_GPU:
        return rows
    chunks = (1024, 2048, 8192)
    return (
        rows
        | {f"Pyper, {n:,} tokens a chunk": lambda n=n: inputs.step(pyper, n) for n in chunks}
        | {
            "Pyper, compiled": lambda: inputs.step(torch.compile(pyper, dynamic=False)),
            "Pyper, CUDA graph": lambda: as_graph(inputs.step(pyper)),
            "compiled cross-entropy": lambda: inputs.step(torch.compile(plain, dynamic=False)),
            "Liger": lambda: inputs.step(liger()),
        }
    )


def print_row(name: str, row: dict[str, Any]) -> None:
    if "failed" in row:
        print(f"{name:<32}  {row['failed']}", flush=True)
        return
    peak = f"{row['peak_gb']:>9.2f}" if row["peak_gb"] is not None else ""
    print(f"{name:<32}{row['ms']:>9.3f}{peak}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for key, value in (TABLE_SHAPE if ON_GPU else TINY_SHAPE).items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--repeats", type=int, default=20 if ON_GPU else 3)
    add_json_option(parser)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if not ON_GPU:
        print("No GPU here: a tiny shape on the CPU, which runs the twin in plain torch.")
    inputs = Inputs(args)
    print(", ".join(f"{getattr(args, key):,} {key}" for key in TABLE_SHAPE))
    errors = check(inputs)
    print("errors against float64: " + ", ".join(f"{k} {v:.1e}" for k, v in errors.items()))
    print(f"{'forward + backward':<32}{'ms':>9}{'peak GB':>9}")
    results: dict[str, Any] = {}
    for name, make in candidates(inputs).items():
        results[name] = measure(make, args.repeats)
        print_row(name, results[name])
        torch.compiler.reset()
    if all(getattr(args, key) == value for key, value in TABLE_SHAPE.items()):
        for name, (ms, gb) in QUOTED.items():
            print(f"{name + ' (quoted, H200)':<32}{ms:>9.1f}{gb:>9.2f}")
    write_record(args.json, {"errors": errors, "rows": results})


if __name__ == "__main__":
    main()
