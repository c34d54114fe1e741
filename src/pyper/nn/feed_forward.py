"""The position-wise feed-forward network."""

from torch import Tensor, nn

from pyper.config import ExpertConfig
from pyper.kernels import launch
from pyper.kernels.activation import activate
from pyper.kernels.feed_forward import dense_feed_forward
from pyper.kernels.fp8_activation import ACTIVATIONS
from pyper.kernels.fp8_products import MULTIPLE, fp8_feed_forward
from pyper.nn.fp8_linear import Fp8Linear


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
        if self.runs_as_one_in_fp8(x):
            rows = x.flatten(0, -2)
            product = fp8_feed_forward(rows, self.up.weight, self.down.weight, self.activation)
            return product.view(x.shape)
        out: Tensor = self.down(activate(self.up(x), self.activation))
        return out

    def runs_as_one(self, x: Tensor) -> bool:
        """Whether training on x goes through kernels that keep less."""
        plain = type(self.up) is nn.Linear and type(self.down) is nn.Linear
        return self.training and plain and launch.runs_triton(x)

    def runs_as_one_in_fp8(self, x: Tensor) -> bool:
        """Whether training on x goes from 8-bit factors to 8-bit factors, activation and all."""
        up, down = self.up, self.down
        if not (isinstance(up, Fp8Linear) and isinstance(down, Fp8Linear)):
            return False
        plain = self.activation in ACTIVATIONS and all(m.bias is None for m in (up, down))
        return plain and up.takes(x) and down.out_features % MULTIPLE == 0
