"""Runs of one routed model on the small data."""

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from pyper.config import RunConfig, parse_run
from pyper.stages.context import Context, open_context

KINDS: dict[str, dict[str, Any]] = {
    "sparse": {"n_experts": 3},
    "token_mixture": {"n_experts": 3, "stem_layers": 1},
    "token_choice": {"n_experts": 3, "routing": "token_choice", "top_k": 2},
}
STEPS = 6


def sparse_run(name: str, folder: Path, data: Path, **sections: dict[str, Any]) -> RunConfig:
    """What a run file of `[model] kind` says, with some keys of its sections changed."""
    values: dict[str, dict[str, Any]] = {
        "run": {"folder": str(folder), "device": "cpu"},
        "data": {"path": str(data), "seq_len": 16, "loader_workers": 0},
        "model": {
            "kind": "token_mixture" if name == "token_mixture" else "sparse",
            "d_model": 16,
            "n_layers": 2,
            "n_heads": 2,
            "d_ff": 24,
            "sparse": KINDS[name],
        },
        "train": {
            "steps": STEPS,
            "global_batch_tokens": 256,
            "learning_rate": 1e-2,
            "eval_every": 2,
            "eval_tokens": 32,
            "log_every": 1,
            "precision": "fp32",
        },
        "evaluate": {"tokens": 128, "prefixes": [4, 8]},
    }
    for key, changes in sections.items():
        values[key] = values.get(key, {}) | changes
    return parse_run(values)


def open_quietly(run: RunConfig) -> Context:
    return open_context(run, Console(file=io.StringIO(), width=300))
