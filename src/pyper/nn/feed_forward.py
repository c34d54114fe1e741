"""The position-wise feed-forward network."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyper.config import ExpertConfig
from pyper.config.expert import Activation


class FeedForward(nn.Module):
    """Two linear maps around an activation; SwiGLU (arXiv:2002.05202) has a gate beside the first.

    `gelu` is x·Φ(x) with the error function, `gelu_tanh` its tanh approximation (they differ by up
    to 4.7e-4), `relu2` is max(x, 0)² (arXiv:2109.08668).
    """

    def __init__(self, config: ExpertConfig) -> None:
        super().__init__()
        self.activation = config.activation
        bias = config.feed_forward_bias
        # SwiGLU's gate and value come from one product.
        width = 2 * config.ff_dim if config.activation == "swiglu" else config.ff_dim
        self.up = nn.Linear(config.d_model, width, bias=bias)
        self.down = nn.Linear(config.ff_dim, config.d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform x (B, T, D) position by position."""
        out: Tensor = self.down(activate(self.up(x), self.activation))
        return out


def activate(hidden: Tensor, activation: Activation) -> Tensor:
    """Apply the activation to (..., F), or to gate and value (..., 2F) of SwiGLU."""
    if activation == "swiglu":
        gate, value = hidden.chunk(2, dim=-1)
        return F.silu(gate) * value
    if activation == "relu2":
        return torch.square(F.relu(hidden))
    return _GELU[activation](hidden)


_GELU = {
    "gelu": partial(F.gelu, approximate="none"),
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
