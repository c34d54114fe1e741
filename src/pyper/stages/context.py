"""What every stage of a run needs: settings, data, folder, device, console."""

import math
import os
from dataclasses import dataclass

import torch
from rich.console import Console

from pyper.config import ExpertConfig, RunConfig, TrainConfig
from pyper.config.explain import nearest
from pyper.data import TextTokenizer, TokenData
from pyper.errors import ConfigError, DataError, TokenizerError
from pyper.stages.folder import RunFolder, folder_of, has_begun, open_run
from pyper.stages.process import keep_freed_memory
from pyper.stages.start import CheckedStart, check_start, open_start


@dataclass(frozen=True)
class Context:
    """One run, opened."""

    run: RunConfig
    data: TokenData
    folder: RunFolder
    device: torch.device
    console: Console
    """Standard error."""
    start: CheckedStart | None = None
    """What `train.start_from` names, read before the run had a folder."""

    @property
    def model(self) -> ExpertConfig:
        """`[model]`, resolved."""
        return self.run.model

    @property
    def n_experts(self) -> int:
        """E."""
        return self.run.mixture.n_experts

    def tokenizer(self) -> TextTokenizer:
        """The data's tokenizer."""
        return self.data.tokenizer()


def open_context(run: RunConfig, console: Console, device_name: str | None = None) -> Context:
    """Check the data, resolve what follows from it, open the run folder, ready the process.

    device_name stands for the run's own, which stays as it is written.
    Raises DataError, ConfigError, TokenizerError, StorageError, CheckpointError.
    """
    keep_freed_memory()
    data = TokenData.open(run.data.path)
    device = pick_device(device_name or run.run.device)
    resolved = resolve_precision(resolve(run, data), device)
    path, start = resolved.train.start_from, None
    if path is not None and not has_begun(folder_of(resolved)):  # or the folder bound the next try
        start = check_start(path)
    folder = open_run(resolved, data.manifest)
    return Context(resolved, data, folder, device, console, start)


def resolve(run: RunConfig, data: TokenData) -> RunConfig:
    """Fill in what the data decides: vocabulary, context, the document token, experts by folder."""
    manifest = data.manifest
    check_weights(run, data.domains)
    if run.train.start_from is None and run.model.vocab_size not in (0, manifest.vocab_size):
        raise TokenizerError(
            f"`model.vocab_size` is {run.model.vocab_size:,}, the tokenizer of {run.data.path} "
            f"has {manifest.vocab_size:,} entries",
            hint="leave `model.vocab_size` out: it follows the data",
        )
    by_folder = run.mixture.assign == "folder" and run.mixture.n_experts > 1
    if by_folder and len(data.domains) != run.mixture.n_experts:
        raise ConfigError(
            f'`assign = "folder"` gives {len(data.domains)} experts, one per domain, but '
            f"`mixture.n_experts` is {run.mixture.n_experts}",
            hint=f'set `n_experts = {len(data.domains)}`, or `assign = "discover"`',
        )
    if run.train.start_from is not None:
        start = open_start(run.train.start_from, manifest.tokenizer_fingerprint)
        # Tables may have more rows than tokens, where the tokenizer is known to be theirs.
        n_rows, n_tokens = start.config.vocab_size, manifest.vocab_size
        if n_rows < n_tokens or (n_rows > n_tokens and not start.tokenizer_is_known):
            raise TokenizerError(
                f"the model of `train.start_from` has a vocabulary of {start.config.vocab_size:,}, "
                f"the tokenizer of {run.data.path} {manifest.vocab_size:,}",
                hint="prepare the data with the tokenizer that the model was trained with",
            )
        return run.model_copy(update={"model": _as_started(run, start.config)})
    model = run.model.model_copy(
        update={
            "vocab_size": manifest.vocab_size,
            "bos_id": manifest.bos_id,
            "seq_len": run.model.seq_len or run.data.seq_len,
        }
    )
    return run.model_copy(update={"model": model})


def check_weights(run: RunConfig, domains: list[str]) -> None:
    """Raises ConfigError for the weight of a domain that the data do not have."""
    own = [(f"expert.{e.name or e.index}.data", e.data.weights) for e in run.expert if e.data]
    for where, weights in [("data", run.data.weights), *own]:
        for name in weights.keys() - set(domains):
            raise ConfigError(
                f"`{where}.weights`: there is no domain `{name}` in {run.data.path}",
                hint=nearest(name, domains),
            )


def _as_started(run: RunConfig, start: ExpertConfig) -> ExpertConfig:
    """The shape of the saved model; `[model]` may say nothing else."""
    for key in run.model.model_fields_set - {"vocab_size", "seq_len", "bos_id"}:
        if getattr(run.model, key) != getattr(start, key):
            raise ConfigError(
                f"`model.{key}` is {getattr(run.model, key)!r}, but the model of "
                f"`train.start_from` has {getattr(start, key)!r}",
                hint="leave `[model]` out: it follows `train.start_from`",
            )
    if run.data.seq_len > start.seq_len:
        raise ConfigError(
            f"`data.seq_len` is {run.data.seq_len:,}, the context of the model of "
            f"`train.start_from` is {start.seq_len:,}",
            hint=f"set `data.seq_len` to {start.seq_len} or less",
        )
    return start


def resolve_precision(run: RunConfig, device: torch.device) -> RunConfig:
    """Replace `precision = "auto"` by what suits the device, for the run and for each expert.

    Raises ConfigError for "fp8" on a device that has no 8-bit products.
    """
    wanted = {run.train.precision} | {e.train.get("precision") for e in run.expert}
    if "fp8" in wanted and not multiplies_fp8(device):
        raise ConfigError(
            f'`train.precision = "fp8"` is for GPUs from compute capability 8.9, not for {device}',
            hint='use `precision = "bf16"`',
        )
    best = {"precision": "bf16" if multiplies_bf16(device) else "fp32"}
    train, experts = run.train, run.expert
    if train.precision == "auto":
        train = train.model_copy(update=best)
    experts = tuple(
        expert.model_copy(update={"train": expert.train | best})
        if expert.train.get("precision") == "auto"
        else expert
        for expert in experts
    )
    return run.model_copy(update={"train": train, "expert": experts})


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16 products (elsewhere they are emulated)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def multiplies_fp8(device: torch.device) -> bool:
    """Whether products of 8-bit floats run; on a CPU they do, but slowly: for tests."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 9)
    return device.type == "cpu"


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises ConfigError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ConfigError(
            f"the device `{name}` cannot be used here",
            hint="`auto`, `cpu`, or what `pyper doctor` lists",
        ) from None
    return device


@dataclass(frozen=True)
class Budget:
    """Optimizer steps of every part of a run."""

    seed: int
    experts: tuple[int, ...]
    control: int

    @property
    def total(self) -> int:
        """Seed and experts together; seed and control take as many."""
        return self.seed + sum(self.experts)


def plan_budget(run: RunConfig, train_tokens: list[int], names: list[str]) -> Budget:
    """Divide the budget: a share for the seed, the rest for the experts, as much for the control.

    `epochs` follow each expert's own data; `tokens` and `steps` are shared equally. An expert with
    a budget of its own takes that. The control makes as many steps as all experts together. Raises
    DataError where `data.weights` leave an expert less than a sequence: before anything is trained.
    """
    for name, n in zip(names, train_tokens, strict=True):
        if n <= run.data.seq_len:
            raise DataError(
                f"expert `{name}` would get {n:,} training tokens an epoch, less than one sequence "
                f"of {run.data.seq_len:,}",
                hint="add data, raise its `data.weights`, or lower `data.seq_len`",
            )
    train, fraction = run.train, run.train.seed_fraction
    total = steps_of(train, sum(train_tokens))
    seed = round(fraction * total)
    shares = [n / sum(train_tokens) for n in train_tokens]
    if train.epochs is None:
        shares = [1 / len(train_tokens)] * len(train_tokens)
    experts = []
    for index, (share, own_tokens) in enumerate(zip(shares, train_tokens, strict=True)):
        if run.has_own_budget(index, names[index]):
            steps = steps_of(run.expert_train(index, names[index]), own_tokens)
        else:
            steps = max(1, round((total - seed) * share))
        experts.append(steps)
    if fraction > 0 and seed == 0:
        raise DataError(
            f"the budget is {total} steps: too few to divide",
            hint="raise `train.epochs`, or lower `train.global_batch_tokens`",
        )
    return Budget(seed, tuple(experts), sum(experts))


def steps_of(train: TrainConfig, data_tokens: int) -> int:
    """Steps of a budget of epochs, tokens or steps over `data_tokens`."""
    if train.steps is not None:
        return train.steps
    tokens = train.tokens if train.tokens is not None else (train.epochs or 1) * data_tokens
    return max(1, math.floor(tokens / train.global_batch_tokens))


def available_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
