"""The position-wise feed-forward network."""

from torch import Tensor, nn

from pyper.config import ExpertConfig
from pyper.kernels import launch
from pyper.kernels.activation import activate
from pyper.kernels.feed_forward import dense_feed_forward


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
        if self.runs_as_one(x):
            up, down = self.up, self.down
            return dense_feed_forward(
                x, up.weight, down.weight, self.activation, up.bias, down.bias
            )
        out: Tensor = self.down(activate(self.up(x), self.activation))
        return out

    def runs_as_one(self, x: Tensor) -> bool:
        """Whether training on x goes through kernels that keep less; 8-bit maps keep their own."""
        plain = type(self.up) is nn.Linear and type(self.down) is nn.Linear
        return self.training and plain and launch.runs_triton(x)
