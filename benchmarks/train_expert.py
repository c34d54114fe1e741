"""One expert's training step beside transformers' on one shape: tokens per second, MFU, memory.

    python benchmarks/train_expert.py [--json FILE] [--only NAME …] [--steps 8] [--micro-batch 8]

The shape of `8x1b5` (1.54 B parameters) on a GPU with 80 GB; smaller with `--layers` and `--width`,
and tiny where there is no GPU.
Each row trains for real (forward, loss, backward, clipping, AdamW) on random tokens, in a process
of its own. transformers runs with weights, gradients and moments in bf16 and PyTorch's fused AdamW;
Pyper keeps weights exact in float32. MFU counts 6N + 12·L·D·T FLOPs per token (N without the input
table) of the card's dense bf16 peak.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from _arcee import arcee_config
from _kernels import kernels_of
from _record import add_json_option, write_record
from rich.console import Console
from rich.table import Table

from pyper.config import ExpertConfig, SparseConfig, TrainConfig
from pyper.data import Batch
from pyper.nn import Transformer, init_weights, train_flops_per_token
from pyper.nn.attention import Attention
from pyper.nn.feed_forward import FeedForward
from pyper.nn.fp8_linear import use_fp8
from pyper.nn.norm import RMSNorm
from pyper.train import next_token_loss
from pyper.train.optimizer import ExpertOptimizer
from pyper.train.recorded_step import RecordedStep
from pyper.train.throughput import peak_flops

ROWS = [
    "transformers eager",
    "transformers compiled",
    "Pyper eager",
    "Pyper compiled",
    "Pyper fp8 compiled",
]
KERNELS: dict[str, type[Attention] | type[FeedForward] | type[RMSNorm]] = {
    "rope": Attention,
    "feed-forward": FeedForward,
    "norm": RMSNorm,
}
Step = Callable[[], float]
SIZES: dict[str, tuple[int, int]] = {  # on a GPU, and without one
    "micro-batch": (8, 2),
    "seq-len": (2048, 64),
    "layers": (28, 2),
    "width": (2048, 128),
    "vocabulary": (32_768, 512),
}
HEAD_DIM = 128


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=ROWS, default=ROWS, metavar="NAME")
    parser.add_argument("--steps", type=int, default=8, help="timed; five more come before")
    for name, (on_gpu, without) in SIZES.items():
        size = on_gpu if torch.cuda.is_available() else without
        parser.add_argument(f"--{name}", type=int, default=size, help=f"({size})")
    parser.add_argument(
        "--experts", type=int, default=0, help="sparse feed-forwards (Pyper's rows)"
    )
    parser.add_argument("--capacity", type=float, default=1.0, help="experts per token")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument(
        "--without",
        nargs="*",
        choices=list(KERNELS),
        default=[],
        metavar="KERNEL",
        help=f"Pyper's rows without its own kernels: {', '.join(KERNELS)}",
    )
    parser.add_argument("--profile", action="store_true", help="print the kernels of a step")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    add_json_option(parser)
    args = parser.parse_args()
    if args.width < HEAD_DIM or args.width % HEAD_DIM:
        parser.error(f"--width must be a multiple of {HEAD_DIM}, one head, not {args.width}")
    return args


def shape_of(args: argparse.Namespace) -> ExpertConfig:
    sparse: dict[str, Any] = {}
    if args.experts:
        routing = SparseConfig(n_experts=args.experts, capacity_factor=args.capacity)
        sparse = {"kind": "sparse", "sparse": routing}
    return ExpertConfig(
        **sparse,
        vocab_size=args.vocabulary,
        seq_len=args.seq_len,
        bos_id=0,
        d_model=args.width,
        n_layers=args.layers,
        n_heads=args.width // HEAD_DIM,
        d_ff=4 * args.width,
    )


def batch_of(args: argparse.Namespace, device: str) -> Batch:
    generator = torch.Generator().manual_seed(0)
    shape = (args.micro_batch, args.seq_len + 1)
    tokens = torch.randint(args.vocabulary, shape, generator=generator).to(device)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def pyper_step(args: argparse.Namespace, device: str, compiled: bool) -> Step:
    for kernel in args.without:
        KERNELS[kernel].runs_as_one = lambda *_: False  # type: ignore[method-assign]
    with torch.device(device):
        model = Transformer(shape_of(args))
    if args.experts:  # billions, one after another on the CPU, would take minutes
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.02)
    else:
        init_weights(model, 0)
    if "fp8" in args.row:
        use_fp8(model.blocks)
    model = model.to(device, torch.bfloat16).train()
    config = TrainConfig(
        steps=100,
        global_batch_tokens=args.micro_batch * args.seq_len,
        micro_batch_size=args.micro_batch,
        learning_rate=1e-4,
        optimizer=args.optimizer,
    )
    if compiled:
        model.compile_blocks()
    step_fn = RecordedStep(model, ExpertOptimizer(model, config, 1e-4), next_token_loss)
    batch = batch_of(args, device)
    return lambda: step_fn([batch], 1.0).loss


def transformers_step(args: argparse.Namespace, device: str, compiled: bool) -> Step:
    from transformers import ArceeForCausalLM

    config = arcee_config(shape_of(args))
    with torch.device(device):
        model = ArceeForCausalLM(config).to(torch.bfloat16).train()
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = batch_of(args, device)

    def step() -> float:
        loss = model(input_ids=batch.tokens, labels=batch.tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def run_row(args: argparse.Namespace) -> dict[str, Any]:
    """Train one row here."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    make = pyper_step if args.row.startswith("Pyper") else transformers_step
    step = make(args, device, args.row.endswith("compiled"))
    start = time.monotonic()
    losses = [step() for _ in range(5)]
    ready = time.monotonic() - start
    seconds = []
    for _ in range(args.steps):
        start = time.monotonic()
        losses.append(step())
        seconds.append(time.monotonic() - start)
    if args.profile:
        print(kernels_of(step), file=sys.stderr)
    speed = args.micro_batch * args.seq_len / median(seconds)
    peak = peak_flops(torch.device(device))
    flops = train_flops_per_token(shape_of(args), args.seq_len)
    return {
        "tokens_per_second": round(speed),
        "mfu": None if peak is None else round(speed * flops / peak, 4),
        "memory_gb": None if device == "cpu" else round(torch.cuda.max_memory_allocated() / 1e9, 1),
        "first_five_steps_s": round(ready, 1),
        "losses": [round(x, 4) for x in losses],
    }


def main() -> None:
    args = parse()
    if args.row:
        print(json.dumps(run_row(args)))
        return
    if not torch.cuda.is_available():
        print("No GPU here: a tiny shape on the CPU, to see that it runs.")
    results: dict[str, Any] = {}
    table = Table("", "tokens/s", "MFU", "GB", "first five steps, s")
    for row in args.only:
        command = [sys.executable, *sys.argv, "--row", row]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            results[row] = {"failed": done.stderr.strip().splitlines()[-1:]}
            print(row, done.stderr[-1500:], file=sys.stderr)
            continue
        if args.profile:
            print(row, done.stderr, sep="\n")
        result = results[row] = json.loads(done.stdout.splitlines()[-1])
        mfu = "" if result["mfu"] is None else f"{result['mfu']:.1%}"
        memory = "" if result["memory_gb"] is None else f"{result['memory_gb']}"
        speed = f"{result['tokens_per_second']:,}"
        table.add_row(row, speed, mfu, memory, str(result["first_five_steps_s"]))
        write_record(args.json, results)
    if all("failed" in result for result in results.values()):
        raise SystemExit("nothing was measured: every row failed")
    Console().print(table)


if __name__ == "__main__":
    main()
