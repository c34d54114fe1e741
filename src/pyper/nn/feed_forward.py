"""The position-wise feed-forward network."""

from torch import Tensor, nn

from pyper.config import ExpertConfig
from pyper.kernels.activation import activate


class FeedForward(nn.Module):
    """Two linear maps around an activation; SwiGLU has a gate beside the first."""

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
