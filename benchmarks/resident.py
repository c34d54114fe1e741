"""How many of eight experts stay in memory: tokens per second, loads and peak memory.

    python benchmarks/resident.py [--json FILE] [--only NAME …] [--resident 1 2 8] [--cold]

Eight random experts in a temporary folder: 29 M parameters each on a CPU, 0.54 B (8.6 GB on disk in
all) on a GPU. Four requests run side by side, 32 tokens of prompt and 32 written. "in runs" asks
for each expert four times in a row, "round robin" for one after the other; "top-2" mixes at every
token: all experts read the prompt, and the two that know its words go on. Every expert has been
used once before the clock starts; `busy` counts processor time instead. Memory is the peak above
that of tiny experts, in MB and in experts, keys and values included (`cache`: all of them).
`--cold`: files leave the page cache before each load.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _random_mixture import (
    CONFIG,
    DEVICE,
    DTYPE,
    GPU,
    PROMPT,
    SIDE_BY_SIDE,
    STREAMS,
    TINY,
    TOKENIZER,
    WRITTEN,
    N,
    counting,
    make_mixture,
    random_expert,
    requests_of,
)
from _record import add_json_option, write_record
from rich.console import Console
from rich.table import Table

from pyper.generate import BatchEngine, EngineLimits, Request, SamplingConfig
from pyper.mixture import load_mixture


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=STREAMS, default=STREAMS, metavar="NAME")
    parser.add_argument("--resident", type=int, nargs="*", default=[1, 2, N])
    parser.add_argument("--cold", action="store_true", help="load from the disk itself")
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)
    add_json_option(parser)
    return parser.parse_args()


def serve(engine: BatchEngine, requests: list[Request]) -> tuple[float, float]:
    """Tokens per second, and per second of this process' processor time."""
    began, began_busy, n_tokens = time.perf_counter(), time.process_time(), 0
    for request in requests:
        engine.submit(request)
    while not engine.idle:
        n_tokens += len(engine.step())
    busy = time.process_time() - began_busy
    return n_tokens / (time.perf_counter() - began), n_tokens / busy


def memory(key: str) -> int:
    """Peak on a GPU; on a CPU VmRSS or VmHWM of this process, pages of mapped files included."""
    if GPU:
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def run_row(args: argparse.Namespace) -> dict[str, Any]:
    stream, loads = args.only[0], list[int]()
    mixture, _ = load_mixture(args.row / "mixture", device=DEVICE, resident=args.resident[0])
    cache = SIDE_BY_SIDE * (PROMPT + WRITTEN) * (N if stream == "top-2" else 1)
    limits = EngineLimits(SIDE_BY_SIDE, cache)
    # Libraries are in memory from here on.
    tiny = mixture.with_loaders([partial(random_expert, i, TINY) for i in range(N)])
    serve(BatchEngine(tiny, TOKENIZER, limits), requests_of(stream))
    start = memory("VmRSS")
    engine = BatchEngine(counting(mixture, args.row, args.cold, loads), TOKENIZER, limits)
    short = SamplingConfig(2, 0.0)
    serve(engine, [Request((TOKENIZER.bos_id, 0), short, expert=expert) for expert in range(N)])
    n_before = len(loads)
    speed, speed_busy = serve(engine, requests_of(stream))
    return {
        "tokens_per_second": round(speed, 1),
        "tokens_per_busy_second": round(speed_busy, 1),
        "loads": len(loads) - n_before,
        "peak_mb": round((memory("VmHWM") - start) / 1e6),
        "cache_mb": round(cache * 2 * CONFIG.n_layers * CONFIG.d_model * DTYPE.itemsize / 1e6),
        "expert_mb": round((args.row / "0" / "model.safetensors").stat().st_size / 1e6),
    }


def measure(args: argparse.Namespace, folder: str, stream: str, resident: int) -> dict[str, Any]:
    """In a process of its own: its peak is that of nothing else."""
    command = [sys.executable, __file__, "--row", folder, "--only", stream]
    command += ["--resident", str(resident), *(["--cold"] if args.cold else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["?"])[-1][:80]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result | {"experts": round(result["peak_mb"] / result["expert_mb"], 2)}


def main() -> None:
    args = parse()
    if args.row:
        print(json.dumps(run_row(args)))
        return
    results: dict[str, Any] = {}
    keys = [
        "tokens_per_second",
        "tokens_per_busy_second",
        "loads",
        "peak_mb",
        "experts",
        "cache_mb",
    ]
    table = Table("stream", "resident", "tokens/s", "busy", "loads", "peak MB", "experts", "cache")
    with tempfile.TemporaryDirectory() as folder:
        make_mixture(Path(folder))
        for stream in args.only:
            for resident in args.resident:
                row = measure(args, folder, stream, resident)
                results[f"{stream}, {resident}"] = row
                write_record(args.json, results)
                cells = [str(row.get(key, "")) for key in keys]
                table.add_row(
                    stream, str(resident), *([row["failed"]] if "failed" in row else cells)
                )
    Console().print(table)


if __name__ == "__main__":
    main()
