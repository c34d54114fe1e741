from pathlib import Path

import torch

from pyper.checkpoint import CheckpointStore


def save(store: CheckpointStore, step: int, *, best: bool = False) -> Path:
    """A small checkpoint whose content tells its step."""
    weights = {"w": torch.full((300,), float(step)), "b": torch.arange(5).bfloat16()}
    return store.save(
        step, weights, {"exp_avg": torch.full((7,), float(step))}, {"position": step}, best=best
    )
