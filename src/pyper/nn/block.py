"""One transformer block."""

from torch import Tensor, nn

from pyper.config import ExpertConfig
from pyper.nn.attention import Attention, AttentionContext
from pyper.nn.feed_forward import FeedForward
from pyper.nn.norm import RMSNorm


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ExpertConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, context: AttentionContext, layer: int) -> Tensor:
        """Transform the residual stream x (B, T, D)."""
        x = x + self.attention(self.attention_norm(x), context, layer)
        out: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return out
