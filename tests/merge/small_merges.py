"""Experts of one seed, and domains that a router can tell apart."""

from typing import Any

import torch
from torch import Tensor

from nn.small_experts import small_expert
from pyper.config import SparseConfig
from pyper.nn import Transformer

SHAPES: list[dict[str, Any]] = [
    {},
    {"activation": "swiglu", "n_kv_heads": 2, "qk_norm": True},
    {"feed_forward_bias": True, "attention_bias": True, "tie_embeddings": True},
]


def branch(seed: Transformer, number: int, distance: float = 0.1) -> Transformer:
    """A model near `seed`, as if trained on from it."""
    generator = torch.Generator().manual_seed(1000 + number)
    other = small_copy(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += distance * torch.randn(parameter.shape, generator=generator)
    return other


def small_copy(model: Transformer) -> Transformer:
    """The same weights in another model."""
    other = Transformer(model.config).to(model.dtype)
    other.load_state_dict(model.state_dict())
    return other.eval()


def branches(n: int = 3, distance: float = 0.1, **changes: Any) -> list[Transformer]:
    """`n` experts that branched from one seed."""
    seed = small_expert(**changes)
    return [branch(seed, number, distance) for number in range(n)]


def token_choice(n_experts: int = 3, top_k: int = 2, **changes: Any) -> SparseConfig:
    """As merged models start."""
    settings = {"routing": "token_choice", "normalize_gates": True} | changes
    return SparseConfig(n_experts=n_experts, top_k=top_k, **settings)


def domains(n: int = 3, rows: int = 12, length: int = 16, seed: int = 0) -> list[Tensor]:
    """One (rows, length) for each domain; each has tokens of its own."""
    generator = torch.Generator().manual_seed(seed)
    own = 16 // n
    return [
        torch.randint(1 + own * d, 1 + own * (d + 1), (rows, length), generator=generator)
        for d in range(n)
    ]


def force_routers(model: Transformer, expert: int) -> None:
    """Token choice of one expert, whatever the gates: biases decide."""
    for block in model.blocks:
        state = block.feed_forward.state
        state.balance_bias.fill_(-1e4)
        state.balance_bias[expert] = 1e4


def randomize_routers(model: Transformer, seed: int = 7, std: float = 0.5) -> None:
    """Routers that disagree from token to token."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("router.weight"):
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Logits here are of order 10: 1e-5 is a relative error of 1e-6."""
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=1e-6)
