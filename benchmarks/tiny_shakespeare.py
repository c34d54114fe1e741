"""One expert on Tiny Shakespeare beside nanoGPT's CPU recipe: validation loss and seconds.

    python benchmarks/tiny_shakespeare.py input.txt.xz --nanogpt path/to/nanoGPT

Both train on the first 90 % and are judged on all of the rest, nats per character (the text is
ASCII, so a byte is a character). Seconds are those of the whole process: imports, training,
validation. nanoGPT needs its own checkout; without one only ours runs. The text is not shipped:
without one this says so and ends.
"""

import argparse
import json
import lzma
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _record import add_json_option, write_record

_RECIPE = (
    "--device=cpu --compile=False --eval_iters=20 --log_interval=100 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 "
    "--lr_decay_iters=2000 --dropout=0.0 --out_dir=out-benchmark"
)


def read_text(path: Path) -> str:
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return str(file.read())


def run_ours(text: str, folder: Path, overrides: list[str]) -> dict[str, float]:
    cut = int(0.9 * len(text))
    domain = folder / "text" / "shakespeare"
    domain.mkdir(parents=True)
    (domain / "train.txt").write_text(text[:cut])
    (domain / "valid.txt").write_text(text[cut:])
    pyper = [sys.executable, "-m", "pyper.cli.main"]
    prepare = [str(folder / "text"), "-o", str(folder / "data"), "--tokenizer", "bytes"]
    prepare += ["--test-fraction", "0"]  # all of the first 90 % is for training
    subprocess.run([*pyper, "prepare", *prepare], check=True, stdout=subprocess.DEVNULL)
    settings = [f"data.path='{folder / 'data'}'", f"run.folder='{folder / 'run'}'", *overrides]
    sets = [part for setting in settings for part in ("--set", setting)]
    start = time.monotonic()
    done = subprocess.run(
        [*pyper, "train", "tiny-shakespeare", "--only", "expert:0", "--json", *sets],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    seconds = time.monotonic() - start
    result = json.loads(done.stdout)["trained"][0]
    return {"loss": result["loss"], "seconds": seconds, "steps": result["steps"]}


def run_nanogpt(text: str, checkout: Path) -> dict[str, float]:
    data = checkout / "data" / "shakespeare_char"
    (data / "input.txt").write_text(text)
    subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True, stdout=subprocess.DEVNULL)
    start = time.monotonic()
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *_RECIPE.split()]
    done = subprocess.run(
        command,
        cwd=checkout,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    losses = re.findall(r"val loss ([0-9.]+)", done.stdout)
    return {"loss": min(map(float, losses)), "seconds": time.monotonic() - start, "steps": 2000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, nargs="?", help="input.txt, or .xz")
    parser.add_argument("--nanogpt", type=Path, help="a checkout to run beside ours")
    parser.add_argument("--set", action="append", default=[], help="override of the run file")
    add_json_option(parser)
    args = parser.parse_args()
    if args.text is None:
        print("needs Tiny Shakespeare: python benchmarks/tiny_shakespeare.py input.txt")
        return
    text = read_text(args.text)
    rows = {}
    if args.nanogpt:
        rows["nanoGPT, its CPU recipe"] = run_nanogpt(text, args.nanogpt)
    with tempfile.TemporaryDirectory() as folder:
        rows["Pyper, tiny-shakespeare"] = run_ours(text, Path(folder), args.set)
    for name, row in rows.items():
        print(f"{name:>26}  {row['loss']:.4f} nats  {row['seconds']:6.1f} s  {row['steps']} steps")
    write_record(args.json, rows)


if __name__ == "__main__":
    main()
