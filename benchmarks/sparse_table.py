"""Routing beside routing: one run file, every way to choose experts, dense beside them.

    python benchmarks/sparse_table.py sparse --data data/mine --seeds 0 1 2

Each row is `pyper train RUN` with a few keys set, from scratch on the same tokens and steps, and
judged on the same held-out text by the causal rule alone. Then each row runs alone for some more
steps, of which the last `--speed-steps` are timed: tokens per second. Every row costs what the
dense model costs (but c = 2 and the shared expert).
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

from _record import add_json_option, write_record
from rich.console import Console
from rich.table import Table

from pyper.config.load import find_run_file, read_toml
from pyper.stages.toml import to_toml
from pyper.train.metrics import read_metrics

S = "model.sparse."
WARM_UP_STEPS = 40
"""At least, before steps are timed: thresholds take over after a fifth of all."""
ARMS: dict[str, list[str]] = {
    "dense": ["model.kind=dense"],
    "expert choice": [],
    "expert choice, sigmoid": [S + "gate=sigmoid"],
    "expert choice, c = 2": [S + "capacity_factor=2.0"],
    "expert choice, 32 experts": [S + "n_experts=32"],
    "threshold": [S + "routing=threshold"],
    "capped at 2": [S + "routing=capped", S + "max_experts_per_token=2"],
    "shared expert": [],  # its width is half of d_ff: see `sets_of`
    "token choice, loss": [S + "routing=token_choice"],
    "token choice, sign bias": [
        S + "routing=token_choice",
        S + "balance=sign_bias",
        S + "gate=sigmoid",
    ],
    "token choice, quantile bias": [
        S + "routing=token_choice",
        S + "balance=quantile_bias",
        S + "bias_rate=0.5",
    ],
    "token mixture": ["model.kind=token_mixture"],
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "run", nargs="?", help="a sparse run file, or a preset: `sparse`, `sparse-d256`"
    )
    parser.add_argument("--data", type=Path, help="from `pyper prepare`")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS), metavar="ARM")
    parser.add_argument("--side-by-side", type=int, default=1, metavar="N")
    parser.add_argument("--speed-steps", type=int, default=20, help="that are timed; 0: none")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets")
    add_json_option(parser)
    return parser.parse_args()


class Runs:
    """Run files and folders of the rows."""

    def __init__(self, options: argparse.Namespace, root: Path) -> None:
        self.options, self.root = options, root
        self.values = read_toml(find_run_file(options.run))

    def train(self, arm: str, seed: int, extra: list[str]) -> tuple[Path, dict[str, Any]]:
        """The run's folder and what `pyper train --json` printed; raises with its own words."""
        folder = self.root / f"{arm}-{seed}-{len(extra)}".replace(" ", "_").replace(",", "")
        values = json.loads(json.dumps(self.values))
        if arm == "dense":
            values["model"].pop("sparse", None)
        file = folder.with_suffix(".toml")
        file.write_text(to_toml(values))
        command = [sys.executable, "-m", "pyper.cli.main", "train", str(file), "--json"]
        for item in [*self.sets_of(arm, seed, folder), *self.options.sets, *extra]:
            command += ["--set", item]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{arm}, seed {seed}: {done.stderr[-2000:]}")
        return folder, json.loads(done.stdout)

    def sets_of(self, arm: str, seed: int, folder: Path) -> list[str]:
        model = self.values["model"]
        own = list(ARMS[arm])
        if arm == "shared expert":
            own = [f"{S}shared_d_ff={model.get('d_ff', 4 * model['d_model']) // 2}"]
        return [
            f"data.path={self.options.data}",
            f"run.folder={folder}",
            f"run.random_seed={seed}",
            "run.jobs=1",
            "train.control=false",
            "train.seed_fraction=0",
            "mixture.n_experts=1",
            "mixture.top_k=1",
            *own,
        ]


def measure(runs: Runs, arm: str, seed: int) -> dict[str, Any]:
    """One row's numbers from one seed."""
    start = time.monotonic()
    folder, evaluation = runs.train(arm, seed, [])
    routing = (evaluation.get("routing") or [{}])[0]
    last = [r for r in read_metrics(folder / "experts/00/metrics.jsonl") if "loss" in r][-1]
    keys = ("teacher_forced", "experts_per_token", "zero_expert_share", "flip_rate")
    return {
        "arm": arm,
        "seed": seed,
        "loss": evaluation["experts"][0],
        "train_loss": last["loss"],
        "max_violation": max((x["max_violation"] for x in routing.get("layers", [])), default=None),
        "by_domain": {d: v["experts"][0] for d, v in evaluation["by_domain"].items()},
        "seconds": round(time.monotonic() - start, 1),
        **{key: routing.get(key) for key in keys},
    }


def speed(runs: Runs, arm: str, steps: int) -> float:
    """Tokens per second of one row that runs alone, over its last `steps` steps.

    Those before them compile, take thresholds over and are recorded.
    """
    total = steps * (1 + math.ceil(WARM_UP_STEPS / steps))
    few = [f"train.steps={total}", f"train.log_every={steps}", "evaluate.tokens=2048"]
    folder, _ = runs.train(arm, 0, [*few, "train.eval_tokens=2048"])
    records = read_metrics(folder / "experts/00/metrics.jsonl")
    return [float(r["tokens_per_second"]) for r in records if "tokens_per_second" in r][-1]


def show(rows: list[dict[str, Any]], speeds: dict[str, float]) -> None:
    """Means over seeds."""
    table = Table("arm", "causal, each seed", "− dense", "forced", "per token", "none", "tokens/s")
    dense = [r["loss"] for r in rows if r["arm"] == "dense"]
    for arm in dict.fromkeys([*(r["arm"] for r in rows), *speeds]):
        own = [r for r in rows if r["arm"] == arm]
        losses = [r["loss"] for r in own]
        cells = [" / ".join(f"{x:.3f}" for x in losses)]
        cells.append(f"{fmean(losses) - fmean(dense):+.3f}" if dense and losses else "")
        for key in ("teacher_forced", "experts_per_token", "zero_expert_share"):
            known = [r[key] for r in own if r[key] is not None]
            cells.append(f"{fmean(known):.3f}" if known else "")
        table.add_row(arm, *cells, f"{speeds[arm]:,.0f}" if arm in speeds else "")
    Console(width=120).print(table)


def main() -> None:
    options = parse()
    if options.run is None or options.data is None:
        print("needs data: python benchmarks/sparse_table.py sparse --data data/mine")
        return
    with tempfile.TemporaryDirectory() as root:
        runs = Runs(options, Path(root))
        todo = [(arm, seed) for seed in options.seeds for arm in options.arms]
        rows: list[dict[str, Any]] = []
        speeds: dict[str, float] = {}
        with ThreadPoolExecutor(options.side_by_side) as pool:
            for row in pool.map(lambda job: measure(runs, *job), todo):
                rows.append(row)
                print(row["arm"], row["seed"], row["loss"], f"{row['seconds']} s", flush=True)
                write_record(options.json, {"rows": rows, "tokens_per_second": speeds})
        for arm in options.arms if options.speed_steps else []:
            speeds[arm] = speed(runs, arm, options.speed_steps)
            write_record(options.json, {"rows": rows, "tokens_per_second": speeds})
    show(rows, speeds)


if __name__ == "__main__":
    main()
