"""One tiny expert and what it needs to train for a few steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyper.config import ExpertConfig, TrainConfig
from pyper.nn import Transformer, init_weights
from pyper.train import Schedule, TrainPlan, TrainResult
from pyper.train.metrics import read_metrics
from pyper.train.optimizer import ExpertOptimizer

SEQ_LEN = 16
TIMES = ("seconds", "tokens_per_second", "mfu")


def new_model(dtype: torch.dtype = torch.float32) -> Transformer:
    config = ExpertConfig(
        vocab_size=257, seq_len=SEQ_LEN, bos_id=0, d_model=16, n_layers=2, n_heads=2, d_ff=32
    )
    model = Transformer(config)
    init_weights(model, 0)
    return model.to(dtype=dtype)


def new_config(**changes: Any) -> TrainConfig:
    """Batches of four sequences; a log line and a validation every two or three steps."""
    values: dict[str, Any] = {
        "steps": 8,
        "global_batch_tokens": 4 * SEQ_LEN,
        "micro_batch_size": 4,
        "learning_rate": 3e-3,
        "eval_every": 3,
        "eval_tokens": 2 * SEQ_LEN,
        "log_every": 1,
    }
    return TrainConfig(**values | changes)


def new_plan(steps: int = 8, **changes: Any) -> TrainPlan:
    values: dict[str, Any] = {
        "name": "tiny",
        "total_steps": steps,
        "schedule": Schedule("wsd", steps, 2, 0.5, 0.0),
        "learning_rate": 3e-3,
        "random_seed": 5,
    }
    return TrainPlan(**values | changes)


def give_gradients(
    model: Transformer, value: Callable[[Tensor], Tensor], optimizer: ExpertOptimizer
) -> None:
    for parameter in model.parameters():
        parameter.grad = value(parameter)
    optimizer.collect_gradients()


def random_gradients(seed: int) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda p: torch.randn(p.shape, generator=generator).to(p.dtype)


def weights_of(model: Transformer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def trace_of(folder: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl` without the times."""
    records = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


Train = Callable[..., tuple[TrainResult, dict[str, Tensor]]]
