"""How speed and memory of training grow: one size at a time, all others as in the first row.

    python benchmarks/scaling.py [--json FILE] [--only d_model seq_len …]

Each point is one row of `train_expert.py` ("Pyper compiled") in a process of its own: real steps on
random tokens. A point that does not fit the GPU is shown as such. Without a GPU the sizes are tiny.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from _record import add_json_option, write_record
from rich.console import Console
from rich.table import Table

ON_GPU = torch.cuda.is_available()
TOKENS = 16_384 if ON_GPU else 256
BASE = (
    {"width": 1024, "layers": 12, "seq-len": 2048, "vocabulary": 32_768}
    if ON_GPU
    else {"width": 128, "layers": 2, "seq-len": 32, "vocabulary": 256}
)
SWEEPS: dict[str, list[dict[str, Any]]] = {
    "d_model": [{"width": n} for n in ((256, 512, 1024, 2048, 4096) if ON_GPU else (128, 256))],
    "n_layers": [{"layers": n} for n in ((4, 12, 24, 48) if ON_GPU else (1, 4))],
    "seq_len": [{"seq-len": n} for n in ((512, 2048, 4096, 16_384) if ON_GPU else (16, 64))],
    "n_experts": [{"experts": n} for n in ((2, 8, 16, 64) if ON_GPU else (2, 8))],
    "capacity": [{"experts": 8, "capacity": c} for c in (0.5, 1.0, 2.0, 4.0)],
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=SWEEPS, default=list(SWEEPS), metavar="SIZE")
    parser.add_argument("--row", default="Pyper compiled" if ON_GPU else "Pyper eager")
    parser.add_argument("--steps", type=int, default=6)
    add_json_option(parser)
    return parser.parse_args()


def measure(options: argparse.Namespace, change: dict[str, Any]) -> dict[str, Any]:
    """One point: what `train_expert.py --row` prints, or why it could not."""
    sizes = BASE | change
    batch = max(1, TOKENS // sizes["seq-len"])
    flags = [part for key, value in sizes.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, str(Path(__file__).with_name("train_expert.py")), *flags]
    command += ["--micro-batch", str(batch), "--steps", str(options.steps), "--row", options.row]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"failed": (done.stderr.strip().splitlines() or ["no word"])[-1][:80]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    options = parse()
    results: dict[str, Any] = {"base": BASE, "tokens_per_step": TOKENS}
    table = Table("size", "value", "tokens/s", "MFU", "GB")
    for sweep in options.only:
        for change in SWEEPS[sweep]:
            value = list(change.values())[-1]
            row = measure(options, change)
            print(sweep, value, {key: row[key] for key in row if key != "losses"}, flush=True)
            results.setdefault(sweep, {})[str(value)] = row
            write_record(options.json, results)
            if "failed" in row:
                table.add_row(sweep, str(value), row["failed"], "", "")
                continue
            mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
            memory = "" if row["memory_gb"] is None else str(row["memory_gb"])
            table.add_row(sweep, str(value), f"{row['tokens_per_second']:,}", mfu, memory)
    Console().print(table)


if __name__ == "__main__":
    main()
