"""Experts small enough for a test, with weights large enough that their outputs differ."""

from typing import Any

import torch
from torch import Tensor

from pyper.config import ExpertConfig
from pyper.nn import Transformer

BOS = 0


def small_config(**changes: Any) -> ExpertConfig:
    """Two layers of four heads."""
    shape: dict[str, Any] = {
        "vocab_size": 17,
        "seq_len": 48,
        "bos_id": BOS,
        "d_model": 16,
        "n_layers": 2,
        "n_heads": 4,
        "d_ff": 24,
    }
    return ExpertConfig(**shape | changes)


def small_expert(seed: int = 0, std: float = 0.3, **changes: Any) -> Transformer:
    """Every parameter random, norm gains and biases included, so that none can be forgotten."""
    model = Transformer(small_config(**changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            centre = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(centre + std * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def text_of(*shape: int, seed: int = 0, vocab_size: int = 17) -> Tensor:
    """Random tokens other than the document token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocab_size, shape, generator=generator)


def change_from(tokens: Tensor, cuts: Tensor, *, seed: int = 1, vocab_size: int = 17) -> Tensor:
    """Rows (B, T) with every token at and after each row's cut (B,) replaced by another one."""
    shift = torch.randint(
        1, vocab_size, tokens.shape, generator=torch.Generator().manual_seed(seed)
    )
    later = torch.arange(tokens.shape[1]) >= cuts[:, None]
    return torch.where(later, (tokens + shift) % vocab_size, tokens)


def random_cuts(n: int, length: int, seed: int = 2) -> Tensor:
    """(n,), each in [1, length)."""
    return torch.randint(1, length, (n,), generator=torch.Generator().manual_seed(seed))
