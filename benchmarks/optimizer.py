"""One optimizer step over a 1.54 B expert's weights: ours beside torch's fused AdamW.

    python benchmarks/optimizer.py [--json FILE] [--only NAME …] [--layers 28] [--width 2048]
    python benchmarks/optimizer.py --programs    # AdamW in programs of other sizes

Ours is checked against torch's before anything is timed. Each row clips random gradients by their
norm and updates all weights. Printed are milliseconds, the bytes that the update has to move, each
once, over that time as a share of what a large copy reaches on the same GPU, and the memory of
weights, gradients and states. Without a GPU a tiny shape runs on the CPU, where the numbers say
nothing about a GPU.
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from _record import add_json_option, write_record
from _timing import as_graph, median_ms
from torch import Tensor, nn

from pyper.config import ExpertConfig, TrainConfig
from pyper.kernels import adamw as kernel
from pyper.kernels import join_weight, launch
from pyper.nn import Transformer
from pyper.train.optimizer import ExpertOptimizer

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


@dataclass(frozen=True)
class Row:
    """One way to update the weights."""

    bytes_per_weight: int
    """What clipping and update have to read and write in this format; 0 for Muon, whose time goes
    into products."""
    make: Callable[[ExpertConfig], Callable[[], object]]
    kernels: bool = True
    """Whether ours may run as kernels."""


def new_model(shape: ExpertConfig, dtype: torch.dtype) -> Transformer:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Transformer(shape).to(dtype)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02)
    return model.to(DEVICE)


def random_gradients(model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    return [1e-3 * torch.randn_like(p, dtype=dtype) for p in model.parameters()]


def torch_adamw(shape: ExpertConfig, master: bool, dtype: torch.dtype) -> Callable[[], object]:
    """Fused AdamW on weights of `dtype`, or on float32 masters of them, as it is usually done."""
    model = new_model(shape, dtype)
    grads = random_gradients(model, dtype)
    params = list(model.parameters())
    masters = [nn.Parameter(p.detach().float()) for p in params] if master else params
    lr = torch.tensor(1e-4, device=DEVICE)
    optimizer = torch.optim.AdamW(masters, lr=lr, fused=True, capturable=ON_GPU)

    def step() -> None:
        for m, grad in zip(masters, grads, strict=True):
            m.grad = grad.float() if master else grad
        nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        for m in masters:
            m.grad = None
        if master:
            with torch.no_grad():
                torch._foreach_copy_(params, masters)

    return step


def ours(shape: ExpertConfig, dtype: torch.dtype, **options: Any) -> Callable[[], object]:
    model = new_model(shape, dtype)
    grads = random_gradients(model, dtype)
    config = TrainConfig(steps=1, learning_rate=1e-4, **options)
    optimizer = ExpertOptimizer(model, config, 1e-4)

    def step() -> None:
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter.grad = grad
        optimizer.collect_gradients()
        optimizer.clip_gradients()
        optimizer.update_weights()

    return step


def rows() -> dict[str, Row]:
    """The gradient is read twice (for the norm and for the update), all else read and written."""
    bf16, fp32 = torch.bfloat16, torch.float32

    def mine(dtype: torch.dtype = bf16, **options: Any) -> Callable[[ExpertConfig], Any]:
        return lambda shape: ours(shape, dtype, **options)

    return {
        "torch AdamW, float32 masters": Row(30, lambda s: torch_adamw(s, True, bf16)),
        "torch AdamW, all bf16": Row(16, lambda s: torch_adamw(s, False, bf16)),
        "Pyper AdamW, float32": Row(32, mine(fp32)),
        "Pyper AdamW, exact bf16": Row(28, mine()),
        "Pyper AdamW, exact bf16, plain torch": Row(28, mine(), kernels=False),
        "Pyper AdamW, exact bf16, 8 bits": Row(16, mine(optimizer="adamw8bit")),
        "Pyper AdamW, stochastic, 8 bits": Row(
            12, mine(optimizer="adamw8bit", weights="stochastic")
        ),
        "Pyper Muon, exact bf16": Row(0, mine(optimizer="muon")),
        "Pyper Muon, exact bf16, 8 bits": Row(0, mine(optimizer="muon", state_bits=8)),
        "Pyper Muon, stochastic, 8 bits": Row(
            0, mine(optimizer="muon", state_bits=8, weights="stochastic")
        ),
    }


def check() -> dict[str, float]:
    """Errors of both exact formats; SystemExit where one is too large."""
    errors = {"float32": error_of(torch.float32), "exact bf16": error_of(torch.bfloat16)}
    if not all(error < 1e-4 for error in errors.values()):
        raise SystemExit(f"wrong results, nothing was timed: {errors}")
    return errors


def error_of(dtype: torch.dtype) -> float:
    """‖ours − torch's‖ / ‖torch's − start‖ after three steps of a small model."""
    start = new_model(ExpertConfig(vocab_size=300, d_model=128, n_layers=2, n_heads=1), dtype)
    mine, theirs = copy.deepcopy(start), copy.deepcopy(start).float()
    grads = random_gradients(start, dtype)
    config = TrainConfig(steps=1, learning_rate=1e-2, weight_decay=0, gradient_clip=None)
    optimizer = ExpertOptimizer(mine, config, 1e-2)
    reference = torch.optim.AdamW(theirs.parameters(), 1e-2, (0.9, 0.95), weight_decay=0)
    for _ in range(3):
        give(mine, grads)
        give(theirs, [grad.float() for grad in grads])
        optimizer.collect_gradients()
        optimizer.step(1.0)
        reference.step()
    low = optimizer.state_dict()["low"]
    exact = [join_weight(p.detach(), low[n]) if low else p for n, p in mine.named_parameters()]
    ours, others, before = (
        torch.cat([p.detach().double().flatten() for p in parameters])
        for parameters in (exact, theirs.parameters(), start.parameters())
    )
    return ((ours - others).norm() / (others - before).norm()).item()


def give(model: nn.Module, grads: list[Tensor]) -> None:
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        parameter.grad = grad.clone()


def programs(shape: ExpertConfig, args: argparse.Namespace, speed: float) -> dict[str, Any]:
    """Blocks of 256 and warps of a program against each other, in the two formats of AdamW."""
    results = {}
    for name in ("Pyper AdamW, exact bf16", "Pyper AdamW, exact bf16, 8 bits"):
        for blocks, warps in ((4, 4), (8, 4), (8, 8), (16, 4), (16, 8), (16, 16)):
            with (
                mock.patch.object(kernel, "_ROWS", blocks),
                mock.patch.object(kernel, "_WARPS", warps),
            ):
                title = f"{name.removeprefix('Pyper ')}, {blocks} blocks, {warps} warps"
                results[title] = measure(rows()[name], shape, args, speed)
            print_row(title, results[title])
    return results


def copy_speed() -> float:
    """Bytes per second of a large copy, read and written."""
    a = torch.empty(2**30 if ON_GPU else 2**24, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * len(a) / (1e-3 * median_ms(lambda _: b.copy_(a), repeats=10))


def measure(
    row: Row, shape: ExpertConfig, args: argparse.Namespace, speed: float
) -> dict[str, Any]:
    """A row that does not run here says why, and the others go on."""
    runs = launch.runs_triton if row.kernels else never
    with mock.patch.object(launch, "runs_triton", runs):
        try:
            return measure_step(row, row.make(shape), args, speed)
        except Exception as error:
            return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:120]}


def never(x: Tensor) -> bool:
    """No work goes to kernels."""
    return False


def measure_step(
    row: Row, step: Callable[[], object], args: argparse.Namespace, speed: float
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "ms": median_ms(lambda _: step(), warmup=3, repeats=args.repeats),
    }
    if ON_GPU:
        result["memory_gb"] = torch.cuda.memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        result["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        result["graph_ms"] = median_ms(as_graph(lambda _: step()), repeats=args.repeats)
    if row.bytes_per_weight:
        moved = row.bytes_per_weight * args.weights
        result["share_of_copy"] = moved / (1e-3 * result["ms"]) / speed
    return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(rows()), default=list(rows()))
    parser.add_argument("--layers", type=int, default=28 if ON_GPU else 2)
    parser.add_argument("--width", type=int, default=2048 if ON_GPU else 64)
    parser.add_argument("--vocabulary", type=int, default=32_768 if ON_GPU else 512)
    parser.add_argument("--repeats", type=int, default=10 if ON_GPU else 3)
    parser.add_argument("--programs", action="store_true", help="compare sizes of programs")
    add_json_option(parser)
    return parser.parse_args()


def shape_of(args: argparse.Namespace) -> ExpertConfig:
    return ExpertConfig(
        vocab_size=args.vocabulary,
        d_model=args.width,
        n_layers=args.layers,
        n_heads=max(1, args.width // 128),
        d_ff=4 * args.width,
    )


def main() -> None:
    args = parse()
    if not ON_GPU:
        print("No GPU here: a tiny shape on the CPU, which runs the twins in plain torch.")
    shape, speed = shape_of(args), copy_speed()
    with torch.device("meta"):
        args.weights = sum(p.numel() for p in Transformer(shape).parameters())
    errors = check()
    print("errors against torch: " + ", ".join(f"{k} {v:.1e}" for k, v in errors.items()))
    print(f"{args.weights:,} weights; a copy moves {speed / 1e9:,.0f} GB/s")
    print(f"{'clip + update':<44}{'ms':>9}{'of copy':>9}{'graph ms':>10}{'GB':>8}{'peak GB':>9}")
    results: dict[str, Any] = {
        "errors": errors,
        "weights": args.weights,
        "copy_gb_per_s": speed / 1e9,
        "rows": {},
    }
    if args.programs:
        results["rows"] = programs(shape, args, speed)
        args.only = []
    for name in args.only:
        found = results["rows"][name] = measure(rows()[name], shape, args, speed)
        print_row(name, found)
        if ON_GPU:
            torch.cuda.empty_cache()
    write_record(args.json, results)


def print_row(name: str, row: dict[str, Any]) -> None:
    if "failed" in row:
        print(f"{name:<44}  {row['failed']}", flush=True)
        return
    share = f"{row['share_of_copy']:.0%}" if "share_of_copy" in row else ""
    line = f"{name:<44}{row['ms']:>9.2f}{share:>9}"
    if "graph_ms" in row:
        line += f"{row['graph_ms']:>10.2f}{row['memory_gb']:>8.1f}{row['peak_gb']:>9.1f}"
    print(line, flush=True)


if __name__ == "__main__":
    main()
