"""Several small experts at once on one device beside one after another: tokens/s, equal losses.

    python benchmarks/train_stacked.py [--json FILE] [--experts 8] [--compile] [--profile]

Each expert's loop has a thread of its own, and each step is taken for all of them in batched
products, as `run.parallel_experts` has it: 3.1 M parameters in blocks, Muon, 16,384 tokens a step,
recorded as CUDA graphs in both arms. The targets: 2.2 times the tokens/s of one after another, and
losses within 1e-4 of separate training. One expert with the batches of all of them is what the
products alone would allow. Without a GPU `--quickstart` takes the shape of the quickstart's
experts, otherwise a tiny shape shows that it runs.
"""

import argparse
import faulthandler
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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
from pyper.train.stacked_steps import StackedSteps
from pyper.train.step import NewStep, StepFunction

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
WARM_UP = 6
# A step that never ends says where it hangs.
PATIENCE_SECONDS = 120
Shape = dict[str, Any]
ON_A_GPU: Shape = {"vocab_size": 8192, "seq_len": 512, "d_model": 256, "n_layers": 4, "n_heads": 4}
QUICKSTART: Shape = {"vocab_size": 2048, "seq_len": 128, "d_model": 96, "n_layers": 3, "n_heads": 3}
TINY: Shape = {"vocab_size": 256, "seq_len": 32, "d_model": 32, "n_layers": 2, "n_heads": 2}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, help="sequences in the batch of one expert")
    parser.add_argument("--quickstart", action="store_true", help="the quickstart's shape")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print the kernels of all at once")
    add_json_option(parser)
    options = parser.parse_args()
    options.shape = QUICKSTART if options.quickstart else ON_A_GPU if ON_GPU else TINY
    options.rows = options.rows or (32 if ON_GPU else 4)
    return options


def make_step(options: argparse.Namespace, expert: int, rows: int, new: NewStep) -> StepFunction:
    model = Transformer(ExpertConfig(bos_id=0, qk_norm=True, **options.shape))
    init_weights(model, expert)
    model = model.to(DEVICE, torch.bfloat16 if ON_GPU else torch.float32).train()
    if options.compile:
        model.compile_blocks()
    config = TrainConfig(
        steps=100,
        global_batch_tokens=rows * options.shape["seq_len"],
        micro_batch_size=rows,
        optimizer="muon",
        learning_rate=2e-3,
    )
    return new(model, ExpertOptimizer(model, config, 2e-3), next_token_loss)


def batches_of(options: argparse.Namespace, expert: int, rows: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(expert)
    shape = (4, rows, options.shape["seq_len"] + 1)
    tokens = torch.randint(options.shape["vocab_size"], shape, generator=generator)
    parts = [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]
    return [Batch(*(x.pin_memory() if ON_GPU else x for x in part)) for part in parts]


class Loop:
    """An expert's steps, and when those that are timed began and ended."""

    def __init__(self, options: argparse.Namespace, expert: int, rows: int) -> None:
        self.options, self.expert, self.rows = options, expert, rows
        self.losses: list[float] = []
        self.begun = self.ended = 0.0

    def run(self, new: NewStep = RecordedStep) -> "Loop":
        step = make_step(self.options, self.expert, self.rows, new)
        batches = batches_of(self.options, self.expert, self.rows)
        for i in range(WARM_UP + self.options.steps):
            if i == WARM_UP:
                self.begun = self._now()
            self.losses.append(step([batches[i % 4]], 0.1).loss)
        self.ended = self._now()
        return self

    def _now(self) -> float:
        if ON_GPU:
            torch.cuda.synchronize()
        return time.monotonic()


def run_at_once(options: argparse.Namespace, n: int) -> list[Loop]:
    """As `stages/together.py` does it."""
    steps = StackedSteps(n)

    def train(expert: int) -> Loop:
        with steps.loop(expert) as new_step:
            return Loop(options, expert, options.rows).run(new_step)

    with ThreadPoolExecutor(n) as pool:
        futures = [pool.submit(train, expert) for expert in range(n)]
        try:
            steps.run()
        finally:
            steps.close()
    return [future.result() for future in futures]


def watched(work: Callable[[], Any]) -> Any:
    """Ends the process, and says where every thread is, when work takes too long."""
    faulthandler.dump_traceback_later(PATIENCE_SECONDS, exit=True)
    try:
        return work()
    finally:
        faulthandler.cancel_dump_traceback_later()


def kernels_of(work: Callable[[], Any], steps: int) -> str:
    """The kernels of a step on average, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
    found = sorted(profile.key_averages(), key=lambda k: -k.self_device_time_total)
    each = [(k.self_device_time_total / 1e3 / steps, k.count / steps, k.key[:90]) for k in found]
    lines = [f"{ms:8.3f} ms {count:7.1f} × {name}" for ms, count, name in each[:45]]
    return "\n".join([f"{sum(ms for ms, _, _ in each):8.3f} ms in all", *lines])


def main() -> None:
    options = parse()
    n_all, work = options.experts, options.steps * options.rows * options.shape["seq_len"]
    alone = [watched(Loop(options, e, options.rows).run) for e in range(n_all)]
    one_by_one = n_all * work / sum(loop.ended - loop.begun for loop in alone)
    results: dict[str, Any] = {"one after another": one_by_one}
    table = Table("at once", "tokens/s", "ratio", "largest difference of a loss")
    table.add_row("1", f"{one_by_one:,.0f}", "1.00", "")
    print(f"one after another: {one_by_one:,.0f} tokens/s", flush=True)
    for n in sorted({min(n, n_all) for n in (2, 4, n_all)}):
        loops = watched(partial(run_at_once, options, n))
        seconds = max(loop.ended for loop in loops) - min(loop.begun for loop in loops)
        speed = n * work / seconds
        pairs = zip(loops, alone, strict=False)
        apart = max(
            abs(a - b) for p in pairs for a, b in zip(p[0].losses, p[1].losses, strict=True)
        )
        results[f"{n} at once"] = {"tokens_per_second": speed, "loss_difference": apart}
        print(f"{n} at once: {speed:,.0f} tokens/s, losses apart {apart:.1e}", flush=True)
        table.add_row(str(n), f"{speed:,.0f}", f"{speed / one_by_one:.2f}", f"{apart:.1e}")
        write_record(options.json, results)
    large = watched(Loop(options, 0, n_all * options.rows).run)
    speed = results["one expert, all batches"] = n_all * work / (large.ended - large.begun)
    table.add_row(f"(one, {n_all} × batch)", f"{speed:,.0f}", f"{speed / one_by_one:.2f}", "")
    write_record(options.json, results)
    Console().print(table)
    if options.profile and ON_GPU:
        n_steps = WARM_UP + options.steps
        try:
            shown = watched(lambda: kernels_of(lambda: run_at_once(options, n_all), n_steps))
        except RuntimeError as error:  # not everybody may trace
            shown = str(error)
        print(shown, file=sys.stderr)


if __name__ == "__main__":
    main()
