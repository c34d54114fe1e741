"""How fast `pyper prepare` is, and how much memory it takes, on text made up here.

    python benchmarks/prepare.py [--json FILE] [--megabytes 200] [--workers 1 2] [--folder /tmp]

Each row is a process of its own, `pyper prepare` of one `.jsonl` as users start it; `peak` is the
most memory it held. The targets: 5 MB/s with two cores, and a peak that does not grow with the
text. `reading` is one pass without tokenizing, of which a run makes two.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _record import add_json_option, write_record

from pyper.config import PrepareConfig
from pyper.data import ReadCounts, read_documents

WORDS = 30_000


def make_text(path: Path, megabytes: float) -> int:
    """Documents of 100 to 10,000 characters, whose words follow Zipf's law; returns how many.

    All are cut from one long text, at random, and numbered: none is equal to another.
    """
    rng = np.random.default_rng(0)
    source = long_text(rng)
    written, n = 0, 0
    with path.open("w", encoding="utf-8") as stream:
        while written < megabytes * 1e6:
            size, start = int(rng.integers(100, 10_000)), int(rng.integers(len(source) - 10_000))
            record = {"text": f"{n}. {source[start : start + size]}"}
            written += stream.write(json.dumps(record) + "\n")
            n += 1
    return n


def long_text(rng: np.random.Generator) -> str:
    """A million words of 1 to 10 letters, in sentences and lines."""
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    share = 1 / np.arange(1, len(letters) + 1)
    chosen = rng.choice(letters, size=(WORDS, 10), p=share / share.sum())
    lengths = rng.integers(1, 11, size=WORDS)
    words = ["".join(row[:n]) for row, n in zip(chosen, lengths, strict=True)]
    odds = 1 / np.arange(1, WORDS + 1)
    picked = rng.choice(WORDS, size=1_000_000, p=odds / odds.sum())
    return " ".join(words[i] for i in picked).replace(" zq", ".\n")


def measure_reading(path: Path) -> float:
    """MB/s of one pass of reading, cleaning and nothing else."""
    start = time.perf_counter()
    for _ in read_documents([path], PrepareConfig(), ReadCounts()):
        pass
    return path.stat().st_size / (time.perf_counter() - start) / 1e6


def measure(path: Path, folder: Path, tokenizer: str, workers: int) -> dict[str, float | str | int]:
    """One `pyper prepare`: MB/s and peak memory."""
    output = folder / f"data-{tokenizer}-{workers}"
    command = [sys.executable, "-m", "pyper.cli.main", "prepare", str(path), "-o", str(output)]
    command += ["--tokenizer", tokenizer, "--workers", str(workers), "--json"]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", _LAUNCH, *command], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr}")
    peak, said = done.stdout.split("\n", 1)
    return {
        "tokenizer": tokenizer,
        "workers": workers,
        "seconds": round(seconds, 1),
        "mb_per_second": round(path.stat().st_size / seconds / 1e6, 2),
        "peak_mb": round(int(peak) * _RSS_UNIT / 1e6),
        "fingerprint": json.loads(said)["fingerprint"],
    }


# A process inherits the peak of the one it was forked from: so that it does not count ours, which
# may have done much before, it is started by one that is small.
_LAUNCH = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, text=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
print(done.stdout, end="")
sys.exit(done.returncode)
"""
# Linux counts in kB, macOS in bytes.
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokenizers", nargs="+", default=["bpe", "bytes"])
    parser.add_argument("--folder", type=Path, help="where the text goes (deleted afterwards)")
    add_json_option(parser)
    return parser.parse_args()


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        n = make_text(folder / "text.jsonl", args.megabytes)
        size = (folder / "text.jsonl").stat().st_size
        print(f"{size / 1e6:,.0f} MB in {n:,} documents")
        reading = measure_reading(folder / "text.jsonl")
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT / 1e6
        print(f"reading alone: {reading:.0f} MB/s, peak {own:,.0f} MB with torch loaded")
        print(f"{'tokenizer':<10}{'workers':>8}{'seconds':>10}{'MB/s':>8}{'peak MB':>9}")
        rows = []
        for tokenizer in args.tokenizers:
            for workers in args.workers:
                row = measure(folder / "text.jsonl", folder, tokenizer, workers)
                rows.append(row)
                print(
                    f"{tokenizer:<10}{workers:>8}{row['seconds']:>10}{row['mb_per_second']:>8}"
                    f"{row['peak_mb']:>9}",
                    flush=True,
                )
        for tokenizer in args.tokenizers:
            found = {r["fingerprint"] for r in rows if r["tokenizer"] == tokenizer}
            assert len(found) == 1, "the output depends on the number of workers"
    write_record(
        args.json, {"megabytes": size / 1e6, "reading_mb_per_second": reading, "rows": rows}
    )


if __name__ == "__main__":
    main()
