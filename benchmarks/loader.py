"""How fast the loader hands out tokens, on synthetic documents of three mean lengths.

    python benchmarks/loader.py [--json FILE] [--seq-len 1024] [--batch-size 32] [--seconds 2]

The target is 20 M tokens/s at a `seq_len` of 1024: far more than any model here consumes.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from _record import add_json_option, write_record

from pyper.data import Documents, Loader, TextTokenizer, TokenData
from pyper.data.manifest import MANIFEST, TOKENIZER, DataManifest, SplitEntry, describe
from pyper.data.shard_writer import ShardWriter

MEAN_LENGTHS = (30, 300, 3000)
WORKERS = (0, 1, 2)


def make_data(folder: Path, n_tokens: int) -> TokenData:
    """One domain for each mean length, `n_tokens` in each."""
    rng = np.random.default_rng(0)
    tokenizer = TextTokenizer.bytes_only()
    tokenizer.save(folder / TOKENIZER)
    domains = {f"mean-{mean}": write_domain(folder, mean, n_tokens, rng) for mean in MEAN_LENGTHS}
    manifest = DataManifest(
        tokenizer_fingerprint=tokenizer.fingerprint,
        tokenizer_file=describe(folder / TOKENIZER, folder),
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        dtype="uint16",
        domains={name: {"train": entry} for name, entry in domains.items()},
        counts={},
        settings={},
        sources=[],
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return TokenData.open(folder)


def write_domain(folder: Path, mean: int, n_tokens: int, rng: np.random.Generator) -> SplitEntry:
    writer = ShardWriter(
        folder, "train", f"mean-{mean}", dtype="uint16", bos_id=0, shard_tokens=5_000_000
    )
    for length in rng.poisson(mean, size=n_tokens // mean).tolist():
        writer.add(rng.integers(1, 257, size=length, dtype=np.uint32), length)
    return writer.close()


def measure(documents: Documents, args: argparse.Namespace, workers: int) -> float:
    """Million tokens per second."""
    loader = Loader(
        documents,
        seq_len=args.seq_len,
        batch_size=args.batch_size,
        random_seed=0,
        workers=workers,
    )
    loader.next_batch()
    start, tokens = time.perf_counter(), 0
    while time.perf_counter() - start < args.seconds:
        tokens += loader.next_batch().tokens.numel()
    elapsed = time.perf_counter() - start
    loader.close()
    return tokens / elapsed / 1e6


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=10_000_000, help="in each domain")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement")
    add_json_option(parser)
    return parser.parse_args()


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder), args.tokens)
        rows = {
            name: {str(n): measure(data.documents("train", [name]), args, n) for n in WORKERS}
            for name in data.domains
        }
    print("M tokens/s     " + "".join(f"{n:>10} workers" for n in WORKERS))
    for name, row in rows.items():
        print(f"{name:<15}" + "".join(f"{speed:>18.1f}" for speed in row.values()))
    write_record(args.json, {"million_tokens_per_second_by_workers": rows})


if __name__ == "__main__":
    main()
