"""The experts of a run as one sparse model (or one dense one), ready to be tuned."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from pyper.checkpoint import write_folder_atomically, write_tensors
from pyper.config import SparseConfig, load_run
from pyper.data import Documents, Packing, TextTokenizer
from pyper.data.chat_template import find_template
from pyper.errors import ConfigError
from pyper.evaluate import HeldOut, domain_losses, held_out_windows, mean_loss
from pyper.merge import (
    add_expert,
    average_weights,
    check_common_seed,
    check_kinship,
    fit_router_means,
    fit_router_ridge,
    init_router_random,
    merge_experts,
    upcycle,
)
from pyper.mixture import (
    ExpertSource,
    MixtureSettings,
    find_mixture,
    load_mixture,
    save_mixture,
)
from pyper.mixture.expert_folder import model_tensors
from pyper.nn import Transformer
from pyper.stages.assign import assign
from pyper.stages.context import Context, open_context
from pyper.stages.start import brought_along
from pyper.stages.train import load_trained

Router = Literal["ridge", "means", "random"]
Result = dict[str, Any]

# Halfway between branches of one seed the loss is below theirs; between strangers, nats above.
BARRIER_LIMIT = 0.5
# Cosines of feed-forwards (decision 0008): branches of one seed 0.98, strangers at most 0.17.
LIKENESS_LIMIT = 0.3
_SAMPLE_TOKENS, _VALID_TOKENS = 4096, 4096


@dataclass(frozen=True)
class MergePlan:
    """What becomes of a run's experts."""

    sparse: SparseConfig
    router: Router = "ridge"
    average: bool = False
    """One dense model of mean weights."""
    upcycle: bool = False
    """Copies of the dense control instead of the experts."""
    noise_std: float = 0.0
    """Of upcycled copies, in units of each matrix' root mean square."""
    barrier_limit: float = BARRIER_LIMIT
    device: str = "auto"
    """"auto" is that of the run."""


def merge_run(run_file: Path, output: Path, plan: MergePlan, console: Console) -> Result:
    """Write the merged model to `output`; its losses on validation text, before any tuning.

    Raises ConfigError, CheckpointError (experts without a common seed, with the measured barrier).
    """
    context = open_context(
        load_run(run_file), console, None if plan.device == "auto" else plan.device
    )
    held_out = held_out_windows(
        context.data.documents("valid"), context.run.data.seq_len, _VALID_TOKENS
    )

    def loss(model: Transformer) -> float:
        return mean_loss(domain_losses(model, held_out), held_out)

    result: Result = {"path": str(output), "router_accuracy": {}, "barrier": None}
    with console.status("merging"):
        if plan.upcycle:
            dense = load_trained(context.folder.control, context.device)
            model = upcycle(dense, plan.sparse, plan.noise_std, context.run.run.random_seed)
            model.calibrate_thresholds(_windows(context.data.documents("train"), context))
            result["before"] = {"control": loss(dense)}
        else:
            experts = _experts(context)
            result["barrier"] = check_common_seed(experts, loss, plan.barrier_limit)
            averaged = average_weights(experts)
            result["before"] = {"average": loss(averaged)} | _losses_of(context, experts, held_out)
            model = averaged
            if not plan.average:
                model = merge_experts(experts, plan.sparse)
                result["router_accuracy"] = _fit(model, context, plan.router)
        result["loss"] = loss(model)
        save_model(output, model, context)
    return result


def add_to_merged(model: Path, expert: Path, name: str, output: Path, device: str) -> Result:
    """One more expert in every sparse layer of a merged model; nothing else changes.

    Raises what `load_mixture` and `add_expert` raise, ConfigError, CheckpointError (an expert of
    another seed).
    """
    mixture, tokenizer = load_mixture(model, device=torch.device(device))
    other, others_tokenizer = load_mixture(expert, device=torch.device(device))
    if tokenizer.fingerprint != others_tokenizer.fingerprint:
        raise ConfigError(
            f"{expert} has another tokenizer than {model}", hint="train it on the same data"
        )
    if name not in other.settings.experts:
        raise ConfigError(
            f"{expert} has no expert `{name}`", hint=f"it has {', '.join(other.settings.experts)}"
        )
    merged, new = mixture.expert(0), other.expert(other.settings.experts.index(name))
    grown = add_expert(merged, new)
    cosine = check_kinship(merged, new, LIKENESS_LIMIT)
    save_single(
        output, grown, mixture.settings, tokenizer, chat_template=find_template(find_mixture(model))
    )
    n_experts = grown.config.routing.n_experts
    return {"path": str(output), "n_experts": n_experts, "cosine": cosine}


def _experts(context: Context) -> list[Transformer]:
    folders = [context.folder.expert(e) for e in range(context.n_experts)]
    return [load_trained(folder, context.device) for folder in folders]


def _losses_of(
    context: Context, experts: Sequence[Transformer], held_out: list[HeldOut]
) -> dict[str, float]:
    """What the merged model is compared with, on the same text: its parts, and the best of them."""
    by_expert = [domain_losses(expert, held_out) for expert in experts]
    best = {h.domain: min(losses[h.domain] for losses in by_expert) for h in held_out}
    losses = {"best_expert_by_domain": mean_loss(best, held_out)}
    for name, folder in (("seed", context.folder.seed), ("control", context.folder.control)):
        if (folder / "best").exists():
            model = load_trained(folder, context.device)
            losses[name] = mean_loss(domain_losses(model, held_out), held_out)
    return losses


def _fit(model: Transformer, context: Context, router: Router) -> dict[str, float]:
    """Routers from what the experts were trained on; the share of tokens that find their own."""
    assigned = assign(context)
    samples = [
        _windows(assigned.documents(context, "train", e), context) for e in range(context.n_experts)
    ]
    if router == "random":
        init_router_random(model, context.run.run.random_seed)
        model.calibrate_thresholds(torch.cat(samples))
        return {}
    return (fit_router_ridge if router == "ridge" else fit_router_means)(model, samples)


def _windows(documents: Documents, context: Context) -> Tensor:
    """(n, T), the first windows of a shuffled epoch."""
    seq_len = context.run.data.seq_len
    packing = Packing(documents, seq_len=seq_len, random_seed=0, epoch=0, shuffle=True)
    n = min(packing.n_sequences, max(1, _SAMPLE_TOKENS // seq_len))
    return torch.from_numpy(packing.sequences(range(n))[:, :-1].copy()).to(context.device)


def save_model(output: Path, model: Transformer, context: Context) -> None:
    """A model of a run, as a mixture of one."""
    brought = brought_along(context.run)
    settings = MixtureSettings(
        experts=("merged",),
        tokenizer_fingerprint=context.data.manifest.tokenizer_fingerprint,
        bos_id=model.config.bos_id,
        stop_ids=brought.stop_ids,
        seq_len=model.config.seq_len,
        router="experts",
        top_k=1,
    )
    save_single(output, model, settings, context.tokenizer(), brought.chat_template)


def save_single(
    output: Path,
    model: Transformer,
    settings: MixtureSettings,
    tokenizer: TextTokenizer,
    chat_template: str | None = None,
) -> None:
    """Write weights, then the mixture that holds them."""
    weights = output.with_name(f".{output.name}-weights")
    try:
        with write_folder_atomically(weights) as folder:
            write_tensors(folder / "model.safetensors", model_tensors(model))
        source = ExpertSource(model.config, weights)
        save_mixture(output, settings, [source], tokenizer, chat_template=chat_template)
    finally:
        shutil.rmtree(weights, ignore_errors=True)
