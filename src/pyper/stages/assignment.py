"""The assignment of a run, as its folder holds it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from pyper.checkpoint import read_tensors, verify_manifest
from pyper.data import SPLITS, Documents, Split, effective_tokens
from pyper.errors import CheckpointError
from pyper.stages.context import Context


@dataclass(frozen=True)
class ExpertData:
    """Which document belongs to which expert, and what follows from it."""

    names: list[str]
    expert: dict[Split, NDArray[np.int64]]
    """By split, the expert of every document."""
    counts: Tensor
    """(E, V), how often each expert meets each token in training."""
    prices: Tensor | None
    """(E,), nats per token; None where folders decided."""

    def documents(self, context: Context, split: Split, expert: int) -> Documents:
        """One expert's documents."""
        everything = context.data.documents(split)
        return everything.select(np.flatnonzero(self.expert[split] == expert))

    def train_tokens(self, context: Context) -> list[int]:
        """Tokens of an epoch of each expert, its `data.weights` counted in."""
        return [
            effective_tokens(
                self.documents(context, "train", e), context.run.domain_weights(e, name)
            )
            for e, name in enumerate(self.names)
        ]


def read_assignment(folder: Path) -> ExpertData:
    """Read an assignment folder. Raises CheckpointError when it is damaged or missing."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not there yet", hint="run `pyper assign`, or `pyper train` as a whole"
        )
    verify_manifest(folder)
    tensors = read_tensors(folder / "documents.safetensors")
    summary = json.loads((folder / "assignment.json").read_text())
    prices = summary["prices"]
    return ExpertData(
        names=summary["experts"],
        expert={split: tensors[split].numpy() for split in SPLITS},
        counts=tensors["counts"],
        prices=None if prices is None else torch.tensor(prices, dtype=torch.float64),
    )


def assignment_summary(folder: Path) -> dict[str, Any]:
    """`assignment.json`: experts, loads, prices, and where each domain's tokens went."""
    summary: dict[str, Any] = json.loads((folder / "assignment.json").read_text())
    return summary


def assignment_table(folder: Path) -> Table:
    """Share of each domain's training tokens (rows) that each expert (columns) got."""
    summary = assignment_summary(folder)
    title = "who reads which share of a domain"
    table = Table(title=title, box=SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("domain", overflow="fold")
    for name in summary["experts"]:
        table.add_column(name, justify="right", overflow="fold", min_width=len("12.5%"))
    for domain, row in summary["domains"].items():
        total = sum(row.values())
        table.add_row(domain, *[f"{n / total:.0%}" if n else "" for n in row.values()])
    table.add_row("load", *[f"{share:.1%}" for share in summary["load"]], style="dim")
    return table
