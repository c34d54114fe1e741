"""One transformer block."""

from torch import Tensor, nn

from pyper.config import ExpertConfig
from pyper.nn.attention import Attention, AttentionContext
from pyper.nn.feed_forward import FeedForward
from pyper.nn.norm import RMSNorm
from pyper.nn.soft_attention import SoftAttention
from pyper.nn.sparse_feed_forward import Routed, SparseFeedForward


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ExpertConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention: Attention | SoftAttention = (
            SoftAttention(config) if config.attention_experts else Attention(config)
        )
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward: FeedForward | SparseFeedForward = (
            SparseFeedForward(config)
            if config.has_sparse_feed_forward(layer)
            else FeedForward(config)
        )

    def forward(
        self, x: Tensor, context: AttentionContext, layer: int
    ) -> tuple[Tensor, Routed | None]:
        """Transform the residual stream x (B, T, D); what routing did, where there is any."""
        x = x + self.attention(self.attention_norm(x), context, layer)
        normed = self.feed_forward_norm(x)
        if isinstance(self.feed_forward, SparseFeedForward):
            out, routed = self.feed_forward(normed, context.rule, context.padding)
            return x + out, routed
        return x + self.feed_forward(normed), None
