"""A small expert and a short training of it, as the package's own names have them."""

from typing import Any

import pyper

SHAPE = pyper.ExpertConfig(d_model=16, n_layers=1, n_heads=2, d_ff=32)
SHORT = pyper.TrainConfig(
    steps=8, global_batch_tokens=64, learning_rate=1e-2, eval_every=4, precision="fp32"
)
TEXTS = [f"{n} and {n} make {2 * n}" for n in range(60)]


def train_small(texts: Any) -> pyper.Model:
    return pyper.train_expert(texts, SHAPE, SHORT, seq_len=16)
