"""Decoding one expert beside transformers' and a plain CUDA-graph loop: tokens per second.

    python benchmarks/decode.py [--json FILE] [--only NAME …] [--batch 64] [--context 512]

The shape of `8x1b5` (1.54 B parameters, bf16) on a GPU; without one a tiny model on the CPU, whose
numbers say only that everything runs. Each row writes greedily after a random prompt, the last
quarter of `--context`, with batch 1 and `--batch`; the first token is that of a 1,024-token prompt
(or half the model's context). The share is the weights' bytes a second (without the input table)
of what the card copies a second. Two experts mix at every token: their ratio is the time of a
token to twice that of one expert. "Five kernels a layer": a single text's too, which otherwise has
one kernel for all layers.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, get_args

import torch
from _decode_model import GPU, expert, long_prompt, random_prompt, shape_of, wait
from _decode_peers import plain_row, transformers_row
from _kernels import kernels_of
from _record import add_json_option, write_record
from _timing import copied_bytes_per_second
from rich.console import Console
from rich.table import Table

from pyper.generate import (
    BatchEngine,
    EngineLimits,
    Narrow,
    Request,
    SamplingConfig,
    with_narrow_weights,
)
from pyper.generate.whole_layers import WholeLayers
from pyper.mixture import Mixture, MixtureSettings
from pyper.nn import PAGE_TOKENS, Transformer

ROWS = [
    "transformers, dynamic cache",
    "transformers, static cache, compiled",
    "plain CUDA graph",
    "Pyper",
    "Pyper, sampled",
    "Pyper, int8",
    "Pyper, five kernels a layer",
    "Pyper, fp8",
    "Pyper, two experts",
    "Pyper compiled",
    "Pyper compiled, int8",
    "Pyper compiled, two experts",
]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=ROWS, default=ROWS, metavar="NAME")
    parser.add_argument("--batch", type=int, default=64 if GPU else 4)
    parser.add_argument("--context", type=int, default=512 if GPU else 64)
    parser.add_argument("--layers", type=int, default=28 if GPU else 2)
    parser.add_argument("--width", type=int, default=2048 if GPU else 128)
    parser.add_argument("--vocabulary", type=int, default=32_768 if GPU else 512)
    parser.add_argument("--profile", action="store_true", help="print the kernels of Pyper's token")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    add_json_option(parser)
    return parser.parse_args()


class AnyText:
    """A tokenizer for random weights: no document ever ends."""

    bos_id = -1

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def decode_bytes(self, tokens: list[int]) -> bytes:
        return b"x" * len(tokens)


def mixture_of(args: argparse.Namespace, n_experts: int) -> Mixture:
    models = [expert(args, seed) for seed in range(n_experts)]
    settings = MixtureSettings(
        experts=tuple(f"expert {i}" for i in range(n_experts)),
        tokenizer_fingerprint="",
        bos_id=0,
        seq_len=models[0].config.seq_len,
        top_k=n_experts,
        prune=0.0,
    )
    return Mixture(settings, [lambda model=model: model for model in models], None)


def pyper_row(args: argparse.Namespace) -> dict[str, float]:
    mixture = mixture_of(args, 2 if args.row.endswith("two experts") else 1)
    for narrow in get_args(Narrow):
        if args.row.endswith(narrow):
            mixture = with_narrow_weights(mixture, narrow)
    room = args.batch * (args.context + PAGE_TOKENS) + shape_of(args).seq_len
    compiled = "compiled" in args.row
    limits = EngineLimits(args.batch, mixture.n_experts * room, compiled=compiled)
    engine = BatchEngine(mixture, AnyText(args.vocabulary), limits)
    sampling = SamplingConfig(
        max_new_tokens=args.context // 4,
        temperature=0.8 if args.row.endswith("sampled") else 0.0,
        top_p=0.95 if args.row.endswith("sampled") else 1.0,
    )
    numbers = {}
    for batch in (1, args.batch):
        for seed in range(2):  # the first records graphs and compiles
            numbers[f"batch {batch}"] = engine_speed(args, engine, sampling, batch, seed)
    prompt = long_prompt(args)
    times = [first_token(engine, prompt[: len(prompt) - i]) for i in range(5)]
    return numbers | {"first token ms": 1e3 * sorted(times)[2]}


def engine_speed(
    args: argparse.Namespace, engine: BatchEngine, sampling: SamplingConfig, batch: int, seed: int
) -> float:
    """Tokens per second from the step in which all rows write to the last token."""
    length = args.context - sampling.max_new_tokens
    for row in range(batch):
        prompt = random_prompt(args, length, seed=1000 * seed + row)
        engine.submit(Request(tuple(prompt), sampling))
    while len(engine.step()) < batch:
        pass
    wait()
    if args.profile and seed == 1:
        print(f"batch {batch}", kernels_of(engine.step, shown=16), sep="\n", file=sys.stderr)
    start, n_tokens = time.perf_counter(), 0
    while not engine.idle:
        n_tokens += len(engine.step())
    wait()
    return n_tokens / (time.perf_counter() - start)


def first_token(engine: BatchEngine, prompt: list[int]) -> float:
    """Seconds from the request to its first token; no two prompts begin alike."""
    start = time.perf_counter()
    request = Request((len(prompt) % 97, *prompt[1:]), SamplingConfig(1, 0.0))
    engine.submit(request)
    while not engine.idle:
        engine.step()
    return time.perf_counter() - start


def run_row(args: argparse.Namespace) -> dict[str, Any]:
    if "five kernels" in args.row:
        WholeLayers.pay_for = staticmethod(lambda *_: False)  # type: ignore[method-assign]
    if args.row.startswith("transformers"):
        return transformers_row(args)
    return plain_row(args) if args.row.startswith("plain") else pyper_row(args)


def rows(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each in a process of its own: none warms another's compiler or keeps its memory."""
    shape = [f"--{n}={getattr(args, n)}" for n in ("batch", "context", "layers", "width")]
    for row in args.only:
        command = [sys.executable, __file__, *shape, f"--vocabulary={args.vocabulary}"]
        command += ["--profile"] if args.profile else []
        command += ["--row", row]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            yield row, {"failed": (done.stderr.strip().splitlines() or ["?"])[-1]}
        else:
            print(done.stderr if args.profile else "", end="")
            yield row, json.loads(done.stdout.splitlines()[-1])


def weight_bytes(args: argparse.Namespace, row: str) -> float:
    """Read for every token: all matrices but the input table, for each expert."""
    with torch.device("meta"):
        model = Transformer(shape_of(args))
    count = sum(p.numel() for p in model.parameters()) - model.embedding.weight.numel()
    width = 1 if row.endswith(get_args(Narrow)) else 2 if GPU else 4
    return count * width * (2 if "two experts" in row else 1)


def main() -> None:
    args = parse()
    if args.row:
        print(json.dumps(run_row(args)))
        return
    console = Console()
    if not GPU:
        console.print("There is no GPU: a tiny model on the CPU, to see that everything runs.")
    bandwidth, results = copied_bytes_per_second(), {}
    columns = ["batch 1", "share", f"batch {args.batch}", "first token ms"]
    table = Table("tokens per second", *columns, "ratio")
    for row, numbers in rows(args):
        if "batch 1" in numbers:
            numbers["share"] = numbers["batch 1"] * weight_bytes(args, row) / bandwidth
        one = results.get(row.partition(",")[0], {})
        if row.endswith("two experts") and "batch 1" in one and "batch 1" in numbers:
            numbers["ratio"] = one["batch 1"] / numbers["batch 1"] / 2
        results[row] = numbers
        cells = [f"{numbers[c]:,.3g}" if c in numbers else "" for c in (*columns, "ratio")]
        console.print(row, numbers)
        table.add_row(row, *cells)
    console.print(table)
    print(f"copies {bandwidth / 1e12:.2f} TB/s")
    write_record(args.json, {"bytes_per_second": bandwidth, "rows": results})


if __name__ == "__main__":
    main()
