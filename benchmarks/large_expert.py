"""One expert of a shipped run file on one device: real steps, a save, a resume, some text.

    python benchmarks/large_expert.py --preset 8x1b5 --data data/mine --steps 20

Trains to the middle, is stopped, resumes from its checkpoint and goes on to the end; then writes.
Prints tokens per second, MFU, peak memory and the seconds of saving and loading.
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import torch

from pyper.config import ExpertConfig, TrainConfig, load_run
from pyper.data import TokenData
from pyper.errors import InterruptedRun
from pyper.generate import SamplingConfig, complete
from pyper.mixture import Mixture, MixtureSettings
from pyper.nn import Transformer, count_parameters, init_weights
from pyper.train import TrainingData, TrainPlan, branch_schedule, train_expert
from pyper.train.metrics import read_metrics


def new_model(
    config: ExpertConfig, device: torch.device, dtype: torch.dtype, *, init: bool
) -> Transformer:
    with torch.device(device):
        model = Transformer(config).to(dtype)
    if init:  # a model that resumes is overwritten anyway
        init_weights(model, seed=0)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="8x1b5")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-tokens", type=int, default=16_384)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    run, data = load_run(args.preset), TokenData.open(args.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = {
        "vocab_size": max(run.model.vocab_size, data.manifest.vocab_size),
        "bos_id": data.manifest.bos_id,
        "seq_len": run.data.seq_len,
    }
    expert = run.model.model_copy(update=shape)
    changes = {
        "epochs": None,
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
    config = TrainConfig.model_validate(run.train.model_dump() | changes)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    documents = TrainingData(
        data.documents("train"), data.documents("valid"), run.data.seq_len, loader_workers=1
    )
    schedule = branch_schedule(config, args.steps, warm=False)
    plan = TrainPlan("expert", args.steps, schedule, float(config.learning_rate))
    numbers: dict[str, object] = {"parameters": count_parameters(expert)}

    with tempfile.TemporaryDirectory() as folder:
        half = args.steps // 2
        start = time.monotonic()
        try:
            train_expert(
                new_model(expert, device, dtype, init=True),
                documents,
                config,
                plan,
                Path(folder),
                should_stop=lambda step: step == half,
            )
        except InterruptedRun as stopped:
            print(stopped.message)
        numbers["first_half_and_save_seconds"] = round(time.monotonic() - start, 1)
        print(numbers, flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        start = time.monotonic()
        model = new_model(expert, device, dtype, init=False)
        result = train_expert(model, documents, config, plan, Path(folder))
        numbers["load_second_half_and_save_seconds"] = round(time.monotonic() - start, 1)
        records = [r for r in read_metrics(Path(folder) / "metrics.jsonl") if "loss" in r]

    losses = [round(r["loss"], 4) for r in records]
    speeds = sorted(r["tokens_per_second"] for r in records[3:] if "tokens_per_second" in r)
    numbers["losses"] = losses
    numbers["steps"] = [r["step"] for r in records]
    numbers["validation"] = result.loss
    numbers["tokens_per_second"] = speeds[len(speeds) // 2]
    numbers["mfu"] = max((r["mfu"] for r in records if "mfu" in r), default=None)
    if device.type == "cuda":
        numbers["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
        numbers["device"] = torch.cuda.get_device_name()
    else:
        numbers["device"] = platform.processor()

    settings = MixtureSettings(
        experts=("expert",),
        tokenizer_fingerprint=data.manifest.tokenizer_fingerprint,
        bos_id=data.manifest.bos_id,
        seq_len=run.data.seq_len,
        top_k=1,
    )
    mixture = Mixture(settings, [lambda: model.eval()], None)
    start = time.monotonic()
    sampling = SamplingConfig(max_new_tokens=64, temperature=0.8, top_k=50)
    with torch.compiler.set_stance("force_eager"):  # the blocks were compiled for training
        text = complete(mixture, data.tokenizer(), ["The "], sampling)[0]
    numbers["generated"] = text.text
    numbers["generated_tokens_per_second"] = round(len(text.pieces) / (time.monotonic() - start), 1)
    for key, value in numbers.items():
        print(f"{key:>36}  {value}")
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
