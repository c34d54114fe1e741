"""Small routed models with trained weights, so that routing depends on what was read."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nn.small_experts import BOS, small_config
from pyper.config import SparseConfig
from pyper.nn import Transformer, init_weights

LENGTH = 24
_STEPS = 60

CAUSAL: dict[str, dict[str, Any]] = {
    "expert choice": {},
    "sigmoid gates": {"gate": "sigmoid"},
    "threshold": {"routing": "threshold"},
    "capped": {"routing": "capped", "max_experts_per_token": 2, "capacity_factor": 1.5},
    "shared expert": {"shared_d_ff": 12, "capacity_factor": 0.5},
    "every other layer": {"every": 2},
    "top 1, loss": {"routing": "token_choice"},
    "top 2, sign bias": {"routing": "token_choice", "top_k": 2, "balance": "sign_bias"},
    "top 1, quantile bias": {
        "routing": "token_choice",
        "gate": "sigmoid",
        "balance": "quantile_bias",
        "bias_rate": 0.1,
    },
    "top 2, none": {"routing": "token_choice", "top_k": 2, "balance": "none"},
    "token mixture": {"stem_layers": 1},
    "token mixture, documents apart": {"stem_layers": 1, "gate": "sigmoid"},
}
"""`[model.sparse]` of every mode that claims to be causal."""

CHOOSING = [name for name in CAUSAL if not name.startswith("top")]


def structured_text(batch: int, seed: int, length: int = LENGTH) -> Tensor:
    """Counting by a step that is drawn for each row, with a digit in eight at random."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(16, (batch, 1), generator=generator)
    step = torch.randint(1, 6, (batch, 1), generator=generator)
    tokens = 1 + (start + step * torch.arange(length)) % 16
    noise = torch.randint(1, 17, tokens.shape, generator=generator)
    tokens = torch.where(torch.rand(tokens.shape, generator=generator) < 1 / 8, noise, tokens)
    tokens[:, 0] = BOS
    return tokens


@cache
@torch.enable_grad()  # whoever asks first may be a test without
def trained(name: str) -> Transformer:
    """In float64 and evaluation mode, with thresholds and biases as training left them.

    float64, because products round differently with the number of rows that an expert reads: what
    remains is information, not rounding.
    """
    mixed = name.startswith("token mixture")
    settings = SparseConfig(**{"n_experts": 4, "threshold_decay": 0.9} | CAUSAL[name])
    model = Transformer(
        small_config(
            kind="token_mixture" if mixed else "sparse",
            sparse=settings,
            n_layers=3 if mixed else 2,  # two above the stem: each expert keeps them apart
            attend_across_documents=not name.endswith("apart"),
            init_std=0.2,
        )
    )
    init_weights(model, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(_STEPS):
        model.begin_step(step / _STEPS)
        tokens = structured_text(16, seed=step)
        reading = model.read(tokens[:, :-1])
        logits = model.head(reading.states).flatten(0, 1)
        loss = F.cross_entropy(logits, tokens[:, 1:].flatten())
        loss = loss + sum(r.auxiliary for r in reading.routed if r.auxiliary is not None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.end_step()
    return model.double().eval()
