"""`--dry-run`: what a run is and needs, before anything is spent."""

from typing import Any

import numpy as np
from rich.console import Group
from rich.markup import escape
from rich.syntax import Syntax
from rich.table import Table

from pyper.checkpoint import format_bytes
from pyper.config import RunConfig
from pyper.data import TokenData, effective_tokens
from pyper.errors import DataError, UsageError
from pyper.nn import count_parameters, train_flops_per_token
from pyper.stages.context import pick_device, plan_budget, resolve, resolve_precision
from pyper.stages.memory import training_memory
from pyper.stages.start import open_start
from pyper.stages.toml import to_toml

# Where the data are not prepared yet: a common size, so that counts can be shown.
_USUAL_VOCABULARY = 32_768


def plan(run: RunConfig) -> dict[str, Any]:
    """Parameters, FLOPs, memory, disk and, where the data are there, steps of a run."""
    steps: dict[str, int] | None = None
    tokens_by_domain: dict[str, Any] = {}
    run = resolve_precision(run, pick_device(run.run.device))
    try:
        data = TokenData.open(run.data.path)
    except DataError as error:
        note = error.message
        if not run.model.vocab_size and run.train.start_from is None:
            note += f"; the counts above are for a vocabulary of {_USUAL_VOCABULARY:,}"
        update = {
            "vocab_size": run.model.vocab_size or _USUAL_VOCABULARY,
            "seq_len": run.model.seq_len or run.data.seq_len,
        }
        model = run.model.model_copy(update=update)
        if run.train.start_from is not None:
            model = open_start(run.train.start_from, None).config
        run = run.model_copy(update={"model": model})
    else:
        run, note = resolve(run, data), ""
        steps = _steps(run, data)
        tokens_by_domain = _domains(run, data)
    needs = _needs(run)
    if steps is not None:
        tokens = sum(steps.values()) * run.train.global_batch_tokens
        needs["train_flops"] = tokens * needs["train_flops_per_token"]
    return {
        "run": run.model_dump(mode="json", exclude_none=True),
        "needs": needs,
        "steps": steps,
        "domains": tokens_by_domain,
        "note": note,
    }


def _steps(run: RunConfig, data: TokenData) -> dict[str, int]:
    """Steps by part, with the data divided equally (the assignment comes later)."""
    n = run.mixture.n_experts
    share = effective_tokens(data.documents("train"), run.data.weights) // n
    budget = plan_budget(run, [share] * n, [f"expert-{i}" for i in range(n)])
    parts = {"seed": budget.seed, "experts": sum(budget.experts)}
    return parts | ({"control": budget.control} if run.train.control else {})


def _domains(run: RunConfig, data: TokenData) -> dict[str, Any]:
    """Training tokens of each domain, its weight, and the tokens that an epoch reads of it."""
    train = data.documents("train")
    tokens = np.bincount(train.domain_index, weights=train.lengths, minlength=len(train.domains))
    table = {}
    for domain, n in zip(train.domains, tokens.tolist(), strict=True):
        weight = run.data.weights.get(domain, 1.0)
        table[domain] = {"tokens": int(n), "weight": weight, "effective": round(n * weight)}
    return table


def _needs(run: RunConfig) -> dict[str, Any]:
    parameters = count_parameters(run.model)
    memory = training_memory(run, on_kernels=run.train.precision != "fp32")
    checkpoint = sum(memory[part] for part in ("weights", "low_halves", "moments"))
    kept = run.train.keep_checkpoints + 1
    parts = run.mixture.n_experts + 1 + int(run.train.control)
    return {
        "parameters_per_expert": parameters,
        "parameters": parameters * run.mixture.n_experts,
        "train_flops_per_token": train_flops_per_token(run.model, run.data.seq_len),
        "memory": memory,
        "checkpoint_bytes": checkpoint,
        "disk_bytes": checkpoint * parts * kept,
    }


def step_plan(planned: dict[str, Any], mfu: float, peak_flops: float) -> dict[str, Any]:
    """FLOPs of one optimizer step, and its seconds where `mfu` of `peak_flops` is reached.

    Raises UsageError for shares and rates that cannot be.
    """
    if not 0 < mfu <= 1:
        raise UsageError(
            f"`--mfu` must be a share in (0, 1], not {mfu:g}", hint="0.4 to 0.6 are usual"
        )
    if not 0 < peak_flops < float("inf"):
        raise UsageError(
            f"`--tflops` must be a finite number, more than 0, not {peak_flops / 1e12:g}",
            hint="take the dense bf16 rate of the device's data sheet",
        )
    tokens = planned["run"]["train"]["global_batch_tokens"]
    flops = tokens * planned["needs"]["train_flops_per_token"]
    seconds = flops / (mfu * peak_flops)
    return {
        "flops": flops,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "mfu": mfu,
        "peak_flops": peak_flops,
    }


def plan_table(planned: dict[str, Any]) -> Group:
    """The resolved run file, and a table of what it needs."""
    run = Syntax(to_toml(planned["run"]), "toml", background_color="default")
    return Group(run, needs_table(planned))


def needs_table(planned: dict[str, Any]) -> Table:
    """What a run needs; of one step too, where `step_plan` is in `planned["step"]`."""
    needs = planned["needs"]
    table = Table(show_header=False, box=None)
    if needs["parameters"] == needs["parameters_per_expert"]:
        table.add_row("the model", f"{needs['parameters']:,} parameters")
        at_a_time = "memory"
    else:
        table.add_row("one expert", f"{needs['parameters_per_expert']:,} parameters")
        table.add_row("all experts", f"{needs['parameters']:,} parameters")
        at_a_time = "memory, one expert at a time"
    table.add_row("training", f"{needs['train_flops_per_token']:,} FLOPs per token")
    memory = {part: format_bytes(n) for part, n in needs["memory"].items() if n}
    table.add_row(at_a_time, memory.pop("total"))
    for part, size in memory.items():
        table.add_row(f"  {part.replace('_', ' ')}", size)
    table.add_row("disk, at most", format_bytes(needs["disk_bytes"]))
    if planned["steps"] is None:
        table.add_row("steps", f"unknown: {planned['note']}".replace("[", "\\["))
    else:
        table.add_row("steps", ", ".join(f"{k} {v:,}" for k, v in planned["steps"].items()))
        table.add_row("in all", f"{needs['train_flops']:.3g} FLOPs")
    if any(d["weight"] != 1.0 for d in planned.get("domains", {}).values()):
        _add_domains(table, planned["domains"])
    if step := planned.get("step"):
        share = f"{100 * step['mfu']:g} % of {step['peak_flops'] / 1e12:g} TFLOP/s"
        spent = f"{step['flops']:.3g} FLOPs, {step['seconds']:.3g} s at {share}"
        table.add_row("one step", spent)
        table.add_row("speed", f"{step['tokens_per_second']:,.0f} tokens per second")
    return table


def _add_domains(table: Table, domains: dict[str, Any]) -> None:
    """What weights make of the data, in one epoch."""
    total = sum(d["effective"] for d in domains.values())
    table.add_row("an epoch", f"{total:,} tokens")
    for name, d in domains.items():
        told = f"{d['tokens']:,} tokens x {d['weight']:g} = {d['effective']:,}"
        table.add_row(f"  {escape(name)}", told)
