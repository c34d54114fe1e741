"""`pyper quickstart` as its user runs it: minutes, and how far the mixture beats its control.

    python benchmarks/quickstart.py [--json FILE] [--seeds 0 1 2] [--keep FOLDER]

Whole processes are timed, importing and evaluating included. The targets, on two CPU cores: three
minutes, and posterior mixing of two experts 0.10 nats below the dense control of the same tokens.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from _record import add_json_option, write_record
from rich.console import Console
from rich.table import Table

COLUMNS = ("control", "oracle", "routed 32", "posterior top-2")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--keep", type=Path, help="leave the runs in this folder")
    add_json_option(parser)
    return parser.parse_args()


def run(folder: Path, seed: int) -> dict[str, Any]:
    """One quickstart in a fresh folder."""
    command = [sys.executable, "-m", "pyper.cli.main", "quickstart", "-o", str(folder), "--json"]
    start = time.monotonic()
    done = subprocess.run(
        [*command, "--set", f"run.random_seed={seed}"], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(done.stderr[-2000:])
    report = json.loads(done.stdout)
    report = report.get("evaluation", report)
    return {
        "seconds": round(time.monotonic() - start, 1),
        "control": report["control"],
        "oracle": report["oracle"],
        "routed 32": report["routed"]["32"],
        "posterior top-2": report["posterior"]["top2"],
    }


def main() -> None:
    options = parse()
    table = Table("seed", "seconds", *COLUMNS, "top-2 − control")
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in options.seeds:
            row = rows[str(seed)] = run((options.keep or Path(scratch)) / f"seed-{seed}", seed)
            gain = row["posterior top-2"] - row["control"]
            cells = [f"{row[name]:.3f}" for name in COLUMNS]
            table.add_row(str(seed), str(row["seconds"]), *cells, f"{gain:+.3f}")
            write_record(options.json, rows)
    Console().print(table)
    gains = [row["posterior top-2"] - row["control"] for row in rows.values()]
    print(f"mean of {len(gains)} seeds: {fmean(gains):+.3f} nats")


if __name__ == "__main__":
    main()
