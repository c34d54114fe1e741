"""Drawing the next tokens: one kernel beside the torch operations that it stands for.

    python benchmarks/draw.py [--json FILE] [--vocabulary 32768]

Milliseconds from log-probabilities to tokens, recorded as a graph on a GPU, so that launches do
not count. `likeliest` is `torch.max` beside the kernel at temperature 0. Without a GPU only the
operations run.
"""

import argparse

import torch
from _record import add_json_option, write_record
from _timing import Step, as_graph, measure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pyper.generate import SamplingBatch, SamplingConfig
from pyper.generate.sampling import draw_torch
from pyper.kernels import drawing, launch

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
CONFIGS = {
    "likeliest": SamplingConfig(temperature=0.0),
    "temperature 0.8": SamplingConfig(temperature=0.8),
    "top-p 0.95": SamplingConfig(temperature=0.8, top_p=0.95),
    "top-k 50": SamplingConfig(temperature=0.8, top_k=50),
    "top-k 50, top-p 0.95": SamplingConfig(temperature=0.8, top_k=50, top_p=0.95),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=32_768 if GPU else 2_048)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 64])
    add_json_option(parser)
    return parser.parse_args()


def ways(name: str, batch: int, log_probs: Tensor) -> dict[str, Step]:
    rules = SamplingBatch.of([CONFIGS[name]] * batch, DEVICE)
    uniforms = torch.rand(batch, device=DEVICE)

    def usual(_: int) -> object:
        greedy = rules.is_greedy
        return log_probs.max(dim=-1) if greedy else draw_torch(log_probs, rules, uniforms)

    def kernel(_: int) -> object:
        return drawing.draw_rows(log_probs, rules.rules, uniforms)

    return {"torch": usual} | ({"kernel": kernel} if launch.runs_triton(log_probs) else {})


def main() -> None:
    args = parse()
    table, results = Table("ms", "batch", "torch", "kernel"), {}
    for batch in args.batches:
        scores = 2.5 * torch.randn(batch, args.vocabulary, device=DEVICE)
        log_probs = scores.log_softmax(dim=-1)
        for name in CONFIGS:
            steps = ways(name, batch, log_probs)
            made = {
                w: (lambda s=s: as_graph(s)) if GPU else (lambda s=s: s) for w, s in steps.items()
            }
            got = {way: measure(make, repeats=30) for way, make in made.items()}
            results[f"{name}, batch {batch}"] = got
            cells = [str(got.get(way, {}).get("ms", ""))[:7] for way in ("torch", "kernel")]
            table.add_row(name, str(batch), *cells)
    Console().print(table)
    write_record(args.json, results)


if __name__ == "__main__":
    main()
