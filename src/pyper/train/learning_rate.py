"""`learning_rate = "auto"`: short real runs at several rates, judged on validation."""

from collections.abc import Callable
from typing import Any

from rich.console import Console

from pyper.config import TrainConfig
from pyper.data import Loader
from pyper.errors import NonFiniteError
from pyper.evaluate.losses import domain_losses, held_out_windows, mean_loss
from pyper.nn import Transformer
from pyper.train.loss import LossFunction, next_token_loss
from pyper.train.micro_batch import choose_micro_batch_size
from pyper.train.optimizer import ExpertOptimizer
from pyper.train.schedule import Schedule
from pyper.train.step import train_step
from pyper.train.training_data import TrainingData

_BASE = 1e-3
_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
_STEPS = 60
_WARMUP = 10
_EVAL_TOKENS = 16_384


def find_learning_rate(
    new_model: Callable[[], Transformer],
    data: TrainingData,
    config: TrainConfig,
    console: Console,
    *,
    loss_fn: LossFunction = next_token_loss,
) -> dict[str, Any]:
    """Try rates around 1e-3 from the same start on the same batches; the lowest loss wins.

    Each run warms up and decays to zero, so that a rate is not judged by its noise. Muon's rate
    moves with AdamW's. Returns `learning_rate` and the losses by rate; a run that diverges counts
    as infinite.
    """
    losses: dict[float, float] = {}
    with console.status("finding the learning rate"):
        for factor in _FACTORS:
            rate = _BASE * factor
            losses[rate] = _short_run(new_model(), data, config, rate, loss_fn)
    best = min(losses, key=lambda rate: losses[rate])
    tried = ", ".join(f"{rate:.1e} → {loss:.3f}" for rate, loss in losses.items())
    console.print(f"learning rate {best:.1e} (validation: {tried})", highlight=False)
    return {"learning_rate": best, "losses": {f"{r:.3e}": v for r, v in losses.items()}}


def _short_run(
    model: Transformer,
    data: TrainingData,
    config: TrainConfig,
    rate: float,
    loss_fn: LossFunction,
) -> float:
    """Validation loss after `_STEPS` updates at one peak rate."""
    fixed = config.model_copy(update={"learning_rate": _BASE})
    optimizer = ExpertOptimizer(model, fixed, rate)
    schedule = Schedule("linear", _STEPS, _WARMUP, 1.0, 0.0)
    size = choose_micro_batch_size(model, config, data.seq_len, loss_fn)
    loader = Loader(
        data.train,
        seq_len=data.seq_len,
        batch_size=config.global_batch_tokens // data.seq_len,
        random_seed=0,
        domain_weights=data.domain_weights,
    )
    try:
        for step in range(_STEPS):
            model.begin_step(step / _STEPS)
            parts = loader.next_batch().split(size)
            train_step(model, parts, optimizer, schedule.factor(step), loss_fn)
    except NonFiniteError:
        return float("inf")
    finally:
        loader.close()
    held_out = held_out_windows(data.valid, data.seq_len, _EVAL_TOKENS)
    model.eval()
    return mean_loss(domain_losses(model, held_out), held_out)
