"""How fast texts are written, against how many there are and how long they are.

    python benchmarks/decode_grid.py [--json FILE] [--batches 1 4 16 64] [--contexts 512 2048]

The expert of `decode.py`, random weights in bf16 on a GPU; without one a model of 29 M parameters
in float32. Each text has a random prompt of three quarters of the context and writes the rest.
Tokens per second, all texts together, from the step in which each has its first token.
"""

import argparse

from _decode_model import GPU
from _record import add_json_option, write_record
from decode import AnyText, engine_speed, mixture_of
from rich.console import Console
from rich.table import Table

from pyper.generate import BatchEngine, EngineLimits, SamplingConfig
from pyper.nn import PAGE_TOKENS


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=[512, 1024, 2048] if GPU else [64, 256]
    )
    parser.add_argument("--layers", type=int, default=28 if GPU else 8)
    parser.add_argument("--width", type=int, default=2048 if GPU else 512)
    parser.add_argument("--vocabulary", type=int, default=32_768 if GPU else 4096)
    add_json_option(parser)
    return parser.parse_args()


def speed(args: argparse.Namespace, batch: int, context: int) -> float:
    """The second of two rounds: the first records graphs."""
    options = argparse.Namespace(**vars(args) | {"context": context, "profile": False})
    limits = EngineLimits(batch, batch * (context + PAGE_TOKENS))
    engine = BatchEngine(args.mixture, AnyText(args.vocabulary), limits)
    sampling = SamplingConfig(max_new_tokens=context // 4, temperature=0.0)
    return [engine_speed(options, engine, sampling, batch, seed) for seed in range(2)][-1]


def main() -> None:
    args = parse()
    options, args.mixture = vars(args).copy(), mixture_of(args, 1)
    options.pop("json")
    table = Table("tokens per second", *(f"batch {batch}" for batch in args.batches))
    results: dict[str, dict[str, float]] = {}
    for context in args.contexts:
        row = results[str(context)] = {}
        for batch in args.batches:
            row[str(batch)] = speed(args, batch, context)
            write_record(args.json, options | {"tokens_per_second": results})
        table.add_row(f"context {context:,}", *(f"{value:,.0f}" for value in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
