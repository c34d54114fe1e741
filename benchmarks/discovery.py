"""Balanced assignment of many sequences to experts: seconds, memory, and how near the optimum.

    python benchmarks/discovery.py [--json FILE] [--sequences 1000000] [--experts 8]

Scores are log-likelihoods of made-up sequences that differ far more in difficulty than experts
differ from each other, which is what makes greedy rules fail. The targets: 1 M sequences and 8
experts in 20 s on two CPU cores, peak memory at most twice the score matrix. Peers: SMALLTALK's
greedy rule, expert choice, and (on a sample it can hold) scipy's exact linear assignment.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from _record import add_json_option, write_record
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pyper.routing import assign_expert_choice, assign_greedy, assign_with_prices

RULES = {
    "prices": assign_with_prices,
    "greedy (SMALLTALK)": assign_greedy,
    "expert choice": assign_expert_choice,
}
_EXACT_SEQUENCES = 2_000


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=1_000_000)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rule", choices=RULES, help=argparse.SUPPRESS)
    add_json_option(parser)
    return parser.parse_args()


def made_up_scores(n: int, n_experts: int) -> Tensor:
    """(N, E) float32 nats: difficulty, a home expert, an expert that is better at everything."""
    generator = torch.Generator().manual_seed(0)
    scores = 8 * torch.randn(n, n_experts, generator=generator)
    scores += -700 + 150 * torch.randn(n, 1, generator=generator)
    home = torch.randint(n_experts, (n, 1), generator=generator)
    scores.scatter_add_(1, home, torch.full((n, 1), 20.0))
    return scores.add_(torch.linspace(10, 0, n_experts))


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_rule(args: argparse.Namespace) -> dict[str, Any]:
    """One rule in this process; what it needs beyond the scores themselves."""
    scores = made_up_scores(args.sequences, args.experts)
    small = scores[:1000].clone()
    RULES[args.rule](small)  # libraries are loaded, threads are there
    before = peak_bytes()
    start = time.monotonic()
    result = RULES[args.rule](scores)
    seconds = time.monotonic() - start
    matrix = scores.numel() * scores.element_size()
    return {
        "seconds": round(seconds, 2),
        "beyond_scores": round((peak_bytes() - before) / matrix, 2),
        "score": float(scores.gather(1, result.expert.unsqueeze(1)).double().mean()),
        "worst_load": float((result.load * args.experts - 1).abs().max()),
    }


def gap_to_the_optimum(n_experts: int) -> float:
    """Nats per sequence that prices lose to scipy's exact assignment, on a sample."""
    from scipy.optimize import linear_sum_assignment

    scores = made_up_scores(_EXACT_SEQUENCES, n_experts)
    places = scores.repeat_interleave(_EXACT_SEQUENCES // n_experts, dim=1).numpy()
    rows, columns = linear_sum_assignment(places, maximize=True)
    priced = assign_with_prices(scores)
    best = places[rows, columns].mean()
    return float(best - scores.gather(1, priced.expert.unsqueeze(1)).double().mean())


def main() -> None:
    args = parse()
    if args.rule:
        print(json.dumps(run_rule(args)))
        return
    table = Table("rule", "seconds", "memory / scores", "nats a sequence", "worst load")
    results: dict[str, Any] = {"sequences": args.sequences, "experts": args.experts}
    for rule in RULES:
        command = [sys.executable, *sys.argv, "--rule", rule]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row = results[rule] = json.loads(done.stdout)
        table.add_row(
            rule,
            f"{row['seconds']:.2f}",
            f"{1 + row['beyond_scores']:.2f}",
            f"{row['score']:.3f}",
            f"{row['worst_load']:.2%}",
        )
    results["gap_to_exact"] = gap_to_the_optimum(args.experts)
    Console().print(table)
    print(f"prices to scipy's optimum on {_EXACT_SEQUENCES:,}: {results['gap_to_exact']:.5f} nats")
    write_record(args.json, results)


if __name__ == "__main__":
    main()
