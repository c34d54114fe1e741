"""One expert of a shipped run file on one device: real steps, a save, a resume, some text.

    python benchmarks/large_expert.py --preset 8x1b5 --steps 20 [--data data/mine]

Trains to the middle, is stopped, resumes from its checkpoint and goes on to the end; then writes.
Prints tokens per second, MFU, peak memory and the seconds of saving and loading. Without `--data`
it reads the embedded corpus; without a GPU with enough memory it says so and ends (`--device cpu`
insists).
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _record import add_json_option, write_record

from pyper.checkpoint import format_bytes
from pyper.config import ExpertConfig, PrepareConfig, RunConfig, TrainConfig, load_run
from pyper.data import TokenData, harvest, prepare
from pyper.errors import InterruptedRun
from pyper.generate import SamplingConfig, complete
from pyper.mixture import Mixture, MixtureSettings
from pyper.nn import Transformer, count_parameters, init_weights
from pyper.train import TrainingData, TrainPlan, TrainResult, branch_schedule, train_expert
from pyper.train.metrics import read_metrics


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="8x1b5")
    parser.add_argument("--data", type=Path, help="from `pyper prepare`; default: made on the way")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-tokens", type=int, default=16_384)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    add_json_option(parser)
    return parser.parse_args()


def needed_bytes(expert: ExpertConfig, tokens_per_pass: int) -> int:
    """Weights and their low halves, gradients, moments; activations; logits and their gradients.

    34 · D bytes per token and block is Korthikanti et al.'s count (arXiv:2205.05198, eq. 1) with
    attention that keeps no scores.
    """
    activations = 34 * expert.d_model * expert.n_layers + 10 * expert.vocab_size
    return 14 * count_parameters(expert) + tokens_per_pass * activations


def lacks_memory(device: torch.device, needed: int) -> str:
    """Why the device cannot do it; empty when it can."""
    if device.type != "cuda":
        return ""
    there = (
        torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else 0
    )
    if there >= needed:
        return ""
    found = f"this one has {format_bytes(there)}" if there else "there is none"
    return f"needs a GPU with about {format_bytes(needed)} of memory; {found}"


def make_data(folder: Path) -> Path:
    """The embedded corpus, prepared."""
    harvest(folder / "corpus")
    prepare([folder / "corpus"], folder / "data", PrepareConfig())
    return folder / "data"


def train_config(run: RunConfig, args: argparse.Namespace) -> TrainConfig:
    changes = {
        "epochs": None,
        "tokens": None,
        "steps": args.steps,
        "global_batch_tokens": args.batch_tokens,
        "micro_batch_size": args.micro_batch_size,
        "warmup_steps": 5,
        "eval_every": 10**9,
        "eval_tokens": 8192,
        "log_every": 1,
        "keep_checkpoints": 1,
        "early_stopping": None,
    }
    return TrainConfig.model_validate(run.train.model_dump() | changes)


def new_model(
    config: ExpertConfig, device: torch.device, dtype: torch.dtype, *, init: bool
) -> Transformer:
    with torch.device(device):
        model = Transformer(config).to(dtype)
    if init:  # a model that resumes is overwritten anyway
        init_weights(model, seed=0)
    return model


def train_in_two_halves(
    expert: ExpertConfig,
    device: torch.device,
    documents: TrainingData,
    config: TrainConfig,
    folder: Path,
) -> tuple[Transformer, dict[str, Any]]:
    """The trained model, and the numbers."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    steps = config.steps or 0
    schedule = branch_schedule(config, steps, warm=False)
    plan = TrainPlan("expert", steps, schedule, float(config.learning_rate))
    numbers: dict[str, Any] = {"parameters": count_parameters(expert)}
    start = time.monotonic()
    try:
        train_expert(
            new_model(expert, device, dtype, init=True),
            documents,
            config,
            plan,
            folder,
            should_stop=lambda step: step == steps // 2,
        )
    except InterruptedRun as stopped:
        print(stopped.message)
    numbers["first_half_and_save_seconds"] = round(time.monotonic() - start, 1)
    print(numbers, flush=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    start = time.monotonic()
    model = new_model(expert, device, dtype, init=False)
    result = train_expert(model, documents, config, plan, folder)
    numbers["load_second_half_and_save_seconds"] = round(time.monotonic() - start, 1)
    return model, numbers | measured(result, folder, device)


def measured(result: TrainResult, folder: Path, device: torch.device) -> dict[str, Any]:
    records = [r for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
    speeds = sorted(r["tokens_per_second"] for r in records[3:] if "tokens_per_second" in r)
    numbers: dict[str, Any] = {
        "losses": [round(r["loss"], 4) for r in records],
        "steps": [r["step"] for r in records],
        "validation": result.loss,
        "tokens_per_second": speeds[len(speeds) // 2] if speeds else None,
        "mfu": max((r["mfu"] for r in records if "mfu" in r), default=None),
    }
    if device.type == "cuda":
        numbers["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    return numbers


def write_some_text(model: Transformer, data: TokenData) -> dict[str, Any]:
    settings = MixtureSettings(
        experts=("expert",),
        tokenizer_fingerprint=data.manifest.tokenizer_fingerprint,
        bos_id=data.manifest.bos_id,
        seq_len=model.config.seq_len,
        top_k=1,
    )
    mixture = Mixture(settings, [lambda: model.eval()], None)
    start = time.monotonic()
    sampling = SamplingConfig(max_new_tokens=64, temperature=0.8, top_k=50)
    with torch.compiler.set_stance("force_eager"):  # the blocks were compiled for training
        text = complete(mixture, data.tokenizer(), ["The "], sampling)[0]
    speed = len(text.pieces) / (time.monotonic() - start)
    return {"generated": text.text, "generated_tokens_per_second": round(speed, 1)}


def main() -> None:
    args = parse()
    run, device = load_run(args.preset), torch.device(args.device)
    seq_len = run.data.seq_len
    vocab_size = run.model.vocab_size or PrepareConfig().vocab_size
    expert = run.model.model_copy(update={"vocab_size": vocab_size})
    if why := lacks_memory(device, needed_bytes(expert, args.micro_batch_size * seq_len)):
        print(f"{args.preset} {why}")
        return
    with tempfile.TemporaryDirectory() as folder:
        data = TokenData.open(args.data or make_data(Path(folder)))
        shape = {
            "vocab_size": max(vocab_size, data.manifest.vocab_size),
            "bos_id": data.manifest.bos_id,
            "seq_len": seq_len,
        }
        documents = TrainingData(
            data.documents("train"), data.documents("valid"), seq_len, loader_workers=1
        )
        model, numbers = train_in_two_halves(
            expert.model_copy(update=shape),
            device,
            documents,
            train_config(run, args),
            Path(folder) / "expert",
        )
        numbers |= write_some_text(model, data)
    for key, value in numbers.items():
        print(f"{key:>36}  {value}")
    write_record(args.json, numbers)


if __name__ == "__main__":
    main()
