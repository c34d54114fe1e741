"""Whether models mean here what they mean in `transformers`: logits and texts, both directions.

    python benchmarks/parity.py [--json FILE]

For every family that `pyper import` knows, several small random models each (tied tables, grouped
queries, biases, every scaling of positions, layers without positions, shards): `import` compares a
stock model with what Pyper makes of its folder; `export` writes that again and compares what
`transformers` opens. Logits are of whole contexts in float32, as a share of the largest; texts are
greedy, with both caches.
"""

import argparse
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

from _record import add_json_option, write_record
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from export.small_stock import (
    VARIANTS,
    logit_difference,
    open_stock,
    our_text,
    save_stock,
    some_tokens,
    stock_model,
    their_text,
)
from pyper.export import export_expert
from pyper.mixture import load_mixture
from pyper.stages.import_model import ImportOptions, import_model

LIMIT = 1e-5


def compare(family: str, changes: dict[str, Any], folder: Path, sharded: bool) -> dict[str, Any]:
    """Largest differences of one model, imported and exported again."""
    stock = stock_model(family, **changes)
    source = save_stock(folder / "stock", stock, sharded=sharded)
    quiet = Console(file=io.StringIO())
    import_model(source, folder / "seed", ImportOptions(), quiet)
    ours = load_mixture(folder / "seed")[0].expert(0)
    architecture = export_expert(ours, folder / "out", shard_bytes=20_000 if sharded else 10**9)
    again = open_stock(folder / "out")
    prompt, length = some_tokens(4, 5), ours.config.seq_len
    written = our_text(ours, prompt, length)
    return {
        "import": logit_difference(ours, stock),
        "export": logit_difference(ours, again),
        "exported as": architecture,
        "same text": bool(
            (written == their_text(stock, prompt, length)).all()
            and (written == their_text(again, prompt, length)).all()
        ),
    }


def measure() -> dict[str, list[dict[str, Any]]]:
    """By family, one row for each variant."""
    results: dict[str, list[dict[str, Any]]] = {}
    for family, variants in VARIANTS.items():
        results[family] = []
        for number, changes in enumerate(variants):
            with tempfile.TemporaryDirectory() as folder:
                row = compare(family, changes, Path(folder), sharded=number % 2 == 1)
            results[family].append({"model": changes, **row})
    return results


def show(results: dict[str, list[dict[str, Any]]]) -> None:
    table = Table(title="largest difference of logits to transformers, float32")
    for column in ("family", "models", "import", "export", "exported as", "same greedy text"):
        table.add_column(column)
    for family, rows in results.items():
        table.add_row(
            family,
            str(len(rows)),
            *(f"{max(row[way] for row in rows):.1e}" for way in ("import", "export")),
            ", ".join(sorted({row["exported as"] for row in rows})),
            f"{sum(row['same text'] for row in rows)} of {len(rows)}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_json_option(parser)
    args = parser.parse_args()
    results = measure()
    show(results)
    write_record(args.json, results)
    rows = [row for family in results.values() for row in family]
    if not all(row["same text"] and max(row["import"], row["export"]) < LIMIT for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
