"""Does a routing rule see the future? Text that nobody can predict tells.

On independent uniform tokens of V kinds no causal model can go below ln V nats per token: what is
below was read off later tokens (a leak), not learned. A tiny model with the routing of a run is
trained on such tokens and measured as it would be evaluated and decoded. Beside it stands one that
chooses within each sequence, which is known to leak: if the probe did not see that, it would be
too weak to trust.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pyper.config import ExpertConfig, SparseConfig, TrainConfig
from pyper.data import Batch
from pyper.errors import ConfigError
from pyper.nn import Rule, Transformer, init_weights
from pyper.train.loss import LossSum, token_loss
from pyper.train.optimizer import ExpertOptimizer
from pyper.train.schedule import Schedule
from pyper.train.step import train_step

_V, _T, _ROWS = 8, 32, 64
_STEPS, _RATE, _TEST_BATCHES = 1200, 3e-3, 100


@dataclass(frozen=True)
class ProbeLoss:
    """Mean loss on fresh tokens, its standard error, and the verdict at three of them."""

    rule: str
    loss: float
    standard_error: float
    leaks: bool


def probe_run(model: ExpertConfig, console: Console, *, steps: int = _STEPS) -> dict[str, Any]:
    """Probe the routing of a run, and the known leak beside it. Raises ConfigError if dense."""
    if model.kind == "dense":
        raise ConfigError(
            'the leak probe is for `model.kind = "sparse"` and `"token_mixture"`',
            hint="the mixing of whole experts is causal by construction and needs none",
        )
    sparse = model.routing
    with console.status("training on tokens that nobody can predict"):
        own = train_on_noise(model.kind, sparse, rule=None, steps=steps)
        rows = [measure(own, None, "as evaluated and decoded")]
        if sparse.is_expert_choice:
            rows.append(measure(own, "expert_choice", "expert choice over the batch"))
        chooser = sparse.model_copy(update={"routing": "expert_choice"})
        leaky = train_on_noise("sparse", chooser, rule="per_sequence", steps=steps)
        rows.append(measure(leaky, "per_sequence", "expert choice within a sequence"))
    return {
        "floor": math.log(_V),
        "routing": sparse.routing,
        "steps": steps,
        "tokens": _TEST_BATCHES * _ROWS * _T,
        "rows": [asdict(row) for row in rows],
    }


def train_on_noise(
    kind: str, sparse: SparseConfig, *, rule: Rule | None, steps: int, random_seed: int = 0
) -> Transformer:
    """A tiny routed model, trained by `rule` (None: as its configuration says) on fresh noise."""
    config = ExpertConfig.model_validate(
        {
            "kind": kind,
            "sparse": sparse,
            "vocab_size": _V,
            "seq_len": _T,
            "d_model": 64,
            "n_layers": 2,
            "n_heads": 2,
            "qk_norm": True,
            "init": "zero_output",
        }
    )
    model = Transformer(config)
    init_weights(model, random_seed)
    train = TrainConfig(steps=steps, optimizer="muon", learning_rate=_RATE)
    optimizer = ExpertOptimizer(model, train, _RATE)
    schedule = Schedule("wsd", steps, 0, 0.5, 0.0)
    generator = torch.Generator().manual_seed(random_seed)

    def loss_fn(model: Transformer, batch: Batch) -> LossSum:
        reading = model.read(batch.tokens, rule=rule)
        loss = token_loss(model.head(reading.states), batch)
        return LossSum(loss.total, loss.weight, reading.routed)

    for step in range(steps):
        model.begin_step(step / steps)
        train_step(model, [_noise(generator)], optimizer, schedule.factor(step), loss_fn)
    return model.eval()


@torch.no_grad()
def measure(model: Transformer, rule: Rule | None, name: str) -> ProbeLoss:
    """The loss on noise that the model has not seen."""
    generator = torch.Generator().manual_seed(1_000_003)
    losses = torch.cat([_losses(model, _noise(generator), rule) for _ in range(_TEST_BATCHES)])
    mean, error = float(losses.mean()), float(losses.std() / math.sqrt(len(losses)))
    return ProbeLoss(name, mean, error, leaks=mean < math.log(_V) - 3 * error)


def _losses(model: Transformer, batch: Batch, rule: Rule | None) -> Tensor:
    logits = model.head(model.read(batch.tokens, rule=rule).states).flatten(0, 1)
    return F.cross_entropy(logits.double(), batch.targets.flatten(), reduction="none")


def _noise(generator: torch.Generator) -> Batch:
    tokens = torch.randint(_V, (_ROWS, _T + 1), generator=generator)
    return Batch(tokens[:, :-1], tokens[:, 1:])


def probe_table(result: dict[str, Any]) -> Table:
    """One line per rule."""
    table = Table(title=f"leak probe: nobody can go below ln {_V} = {result['floor']:.4f} nats")
    for name in ("routing", "nats/token", "± (1 σ)", "sees the future"):
        table.add_column(name, justify="left" if name == "routing" else "right")
    for row in result["rows"]:
        verdict = "[red]yes[/]" if row["leaks"] else "[green]no[/]"
        error = f"{row['standard_error']:.4f}"
        table.add_row(row["rule"], f"{row['loss']:.4f}", error, verdict)
    return table
