"""Several small experts at once on one device beside one after another: tokens/s, equal losses.

    python benchmarks/train_stacked.py [--json FILE] [--experts 8] [--compile]

Each expert trains in a thread and on a stream of its own, as `run.parallel_experts` has it: 3.1 M
parameters, Muon, 16,384 tokens a step. The targets: 2.2 times the tokens/s of one after another,
and losses within 1e-4 of separate training. Without a GPU a tiny shape shows that it runs.
"""

import argparse
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from _record import add_json_option, write_record
from rich.console import Console
from rich.table import Table

from pyper.config import ExpertConfig, TrainConfig
from pyper.data import Batch
from pyper.nn import Transformer, init_weights
from pyper.train import next_token_loss
from pyper.train.optimizer import ExpertOptimizer
from pyper.train.recorded_step import RecordedStep

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
SHAPE = (
    {"vocab_size": 8192, "seq_len": 512, "d_model": 256, "n_layers": 4, "n_heads": 4}
    if ON_GPU
    else {"vocab_size": 256, "seq_len": 32, "d_model": 32, "n_layers": 2, "n_heads": 2}
)
ROWS = 32 if ON_GPU else 4
WARM_UP = 6


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--compile", action="store_true")
    add_json_option(parser)
    return parser.parse_args()


def make_step(expert: int, compiled: bool) -> RecordedStep:
    model = Transformer(ExpertConfig(bos_id=0, qk_norm=True, **SHAPE))
    init_weights(model, expert)
    model = model.to(DEVICE, torch.bfloat16 if ON_GPU else torch.float32).train()
    if compiled:
        model.compile_blocks()
    config = TrainConfig(
        steps=100,
        global_batch_tokens=ROWS * SHAPE["seq_len"],
        micro_batch_size=ROWS,
        optimizer="muon",
        learning_rate=2e-3,
    )
    return RecordedStep(model, ExpertOptimizer(model, config, 2e-3), next_token_loss)


def batches_of(expert: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(expert)
    shape = (4, ROWS, SHAPE["seq_len"] + 1)
    tokens = torch.randint(SHAPE["vocab_size"], shape, generator=generator)
    parts = [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]
    return [Batch(*(x.pin_memory() if ON_GPU else x for x in part)) for part in parts]


class Crew:
    """Experts that begin their timed steps together."""

    def __init__(self, options: argparse.Namespace, experts: range) -> None:
        self.options, self.experts = options, experts
        self.start = threading.Barrier(len(experts))
        self.seconds: dict[int, float] = {}
        self.losses: dict[int, list[float]] = {}

    def run(self) -> float:
        """Seconds until the last is done. Raises what an expert raised."""
        with ThreadPoolExecutor(len(self.experts)) as pool:
            futures = [pool.submit(self._train, expert) for expert in self.experts]
        errors = [error for f in futures if (error := f.exception()) is not None]
        for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise error
        return max(self.seconds.values())

    def _train(self, expert: int) -> None:
        try:
            self._train_on_own_stream(expert)
        except BaseException:
            self.start.abort()  # or the others would wait for it for ever
            raise

    def _train_on_own_stream(self, expert: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()) if ON_GPU else nullcontext():
            step, batches = make_step(expert, self.options.compile), batches_of(expert)
            losses = [step([batches[i % 4]], 0.1).loss for i in range(WARM_UP)]
            self._wait()
            self.start.wait()
            begun = time.monotonic()
            for i in range(self.options.steps):
                losses.append(step([batches[i % 4]], 0.1).loss)
            self._wait()
            self.seconds[expert] = time.monotonic() - begun
            self.losses[expert] = losses

    def _wait(self) -> None:
        if ON_GPU:
            torch.cuda.current_stream().synchronize()


def main() -> None:
    options = parse()
    work = options.steps * ROWS * SHAPE["seq_len"]
    alone = [Crew(options, range(e, e + 1)) for e in range(options.experts)]
    one_by_one = options.experts * work / sum(crew.run() for crew in alone)
    results: dict[str, Any] = {"one after another": one_by_one}
    table = Table("at once", "tokens/s", "ratio", "largest difference of a loss")
    table.add_row("1", f"{one_by_one:,.0f}", "1.00", "")
    print(f"one after another: {one_by_one:,.0f} tokens/s", flush=True)
    for n in sorted({min(n, options.experts) for n in (2, 4, options.experts)}):
        crew = Crew(options, range(n))
        speed = n * work / crew.run()
        pairs = [zip(crew.losses[e], alone[e].losses[e], strict=True) for e in range(n)]
        apart = max(abs(a - b) for pair in pairs for a, b in pair)
        results[f"{n} at once"] = {"tokens_per_second": speed, "loss_difference": apart}
        print(f"{n} at once: {speed:,.0f} tokens/s, losses apart {apart:.1e}", flush=True)
        table.add_row(str(n), f"{speed:,.0f}", f"{speed / one_by_one:.2f}", f"{apart:.1e}")
        write_record(options.json, results)
    Console().print(table)


if __name__ == "__main__":
    main()
