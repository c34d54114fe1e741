"""Measure a run: the mixture in every mode beside its controls."""

from pathlib import Path
from typing import Any

import torch

from pyper.checkpoint import write_json_atomically as write_json
from pyper.evaluate import (
    evaluation_report,
    held_out_windows,
    routing_report,
    score_held_out,
)
from pyper.mixture import load_mixture
from pyper.stages.context import Context
from pyper.stages.folder import read_json
from pyper.stages.train import finished_result, load_trained


def evaluate(context: Context) -> dict[str, Any]:
    """Write and return `evaluation.json`; kept when nothing it depends on has changed."""
    inputs = _inputs(context)
    saved = read_json(context.folder.evaluation)
    if saved is not None and saved.get("inputs") == inputs:
        return dict(saved)
    settings = context.run.evaluate
    mixture, _ = load_mixture(context.folder.mixture, device=context.device, resident=1)
    held_out = held_out_windows(
        context.data.documents(settings.split), context.run.data.seq_len, settings.tokens
    )
    control = None
    if finished_result(context.folder.control) is not None:
        control = load_trained(context.folder.control, context.device)
    shards = [
        load_trained(context.folder.random_shard(i), context.device)
        for i in range(context.n_experts)
        if finished_result(context.folder.random_shard(i)) is not None
    ]
    with context.console.status("evaluating"):
        scores = score_held_out(mixture, held_out, control=control, random_shards=shards)
        prices = mixture.settings.prices
        report = evaluation_report(
            scores,
            experts=mixture.settings.experts,
            temperature=mixture.settings.temperature,
            prefixes=settings.prefixes,
            prices=torch.tensor(prices, dtype=torch.float64) if prices else None,
        )
    if context.model.kind != "dense":
        report["routing"] = [
            routing_report(mixture.expert(e), held_out) for e in range(mixture.n_experts)
        ]
    report |= {"split": settings.split, "steps": _steps(context), "inputs": inputs}
    write_json(context.folder.evaluation, report)
    return report


def _inputs(context: Context) -> dict[str, Any]:
    """What the numbers depend on."""
    manifest = read_json(context.folder.mixture / "MANIFEST.json") or {}
    return {
        "mixture": manifest.get("sha256"),
        "control": finished_result(context.folder.control) is not None,
        "evaluate": context.run.evaluate.model_dump(mode="json"),
    }


def _steps(context: Context) -> dict[str, int]:
    """Optimizer steps that each part made: seed plus experts equals seed plus control."""
    folders: dict[str, Path] = {"seed": context.folder.seed, "control": context.folder.control}
    folders |= {f"expert:{i}": context.folder.expert(i) for i in range(context.n_experts)}
    results = {name: finished_result(folder) for name, folder in folders.items()}
    return {name: result.steps for name, result in results.items() if result is not None}
