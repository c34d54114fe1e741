"""Text to token shards, with progress and a summary."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pyper.config import PrepareConfig
from pyper.data import DataManifest, prepare
from pyper.data.counts import say_count


def prepare_with_progress(
    sources: Sequence[Path], output: Path, config: PrepareConfig, console: Console
) -> DataManifest:
    """`prepare`, saying which pass it is in and how many documents it has seen."""
    if config.workers:
        # Read once, when the library's threads start: in this process nothing was tokenized yet.
        os.environ["RAYON_NUM_THREADS"] = str(config.workers)
    names = {"read": "reading", "write": "tokenizing"}
    with console.status("reading") as status:
        return prepare(
            sources,
            output,
            config,
            progress=lambda phase, done: status.update(f"{names[phase]}: {done:,} documents"),
            warn=lambda message: console.print(
                f"warning: {message}", highlight=False, markup=False
            ),
        )


def data_summary(manifest: DataManifest, path: Path) -> dict[str, Any]:
    """What a data folder holds, for `--json`."""
    return {
        "kind": "data",
        "path": str(path),
        "fingerprint": manifest.fingerprint,
        "vocab_size": manifest.vocab_size,
        "tokenizer_fingerprint": manifest.tokenizer_fingerprint,
        "counts": dict(manifest.counts),
        "domains": {
            domain: {
                split: {"documents": e.documents, "tokens": e.tokens, "bytes": e.bytes}
                for split, e in splits.items()
            }
            for domain, splits in manifest.domains.items()
        },
    }


def data_table(manifest: DataManifest, path: Path) -> Table:
    """Documents and tokens by domain and split; below it what was mended or left out."""
    left_out = {k: v for k, v in manifest.counts.items() if v and k not in _TOTALS}
    said = ", ".join(f"{v:,} {say_count(k)}" for k, v in left_out.items()) or "nothing"
    learned = ""
    if chats := manifest.counts.get("chats"):
        learned = f"{chats:,} chats, of which the answers are learned\n"
    table = Table(
        title=f"{escape(str(path))}: {manifest.vocab_size:,} token types",
        box=SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
        caption=f"{learned}mended or left out: {escape(said)}",
    )
    table.add_column("domain", overflow="fold")
    for split in ("train", "valid", "test"):
        table.add_column(f"{split} documents", justify="right", overflow="fold")
        table.add_column("tokens", justify="right", min_width=len("1,234,567"))
    table.add_column("bytes/ token", justify="right", overflow="fold")
    for domain, splits in manifest.domains.items():
        cells = [
            text
            for split in ("train", "valid", "test")
            for text in (f"{splits[split].documents:,}", f"{splits[split].tokens:,}")
        ]
        tokens = sum(e.tokens for e in splits.values())
        ratio = sum(e.bytes for e in splits.values()) / max(1, tokens)
        table.add_row(escape(domain), *cells, f"{ratio:.2f}")
    return table


_TOTALS = {"files", "documents", "chats"}
