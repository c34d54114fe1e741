"""One transformer block."""

from torch import Tensor, nn

from pyper.config import ExpertConfig
from pyper.nn.attention import Attention, AttentionContext
from pyper.nn.feed_forward import FeedForward
from pyper.nn.norm import RMSNorm
from pyper.nn.soft_attention import SoftAttention
from pyper.nn.sparse_feed_forward import Routed, SparseFeedForward


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); or x + norm(…(x)) (`post`)."""

    def __init__(self, config: ExpertConfig, layer: int) -> None:
        super().__init__()
        self.is_post_norm = config.norm_position == "post"
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention: Attention | SoftAttention = (
            SoftAttention(config, layer) if config.attention_experts else Attention(config, layer)
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
        x, before = self._attend(x, context, layer)
        if isinstance(self.feed_forward, SparseFeedForward):
            out, routed = self.feed_forward(before, context.rule, context.padding)
            return self.add_feed_forward(x, out), routed
        return self.add_feed_forward(x, self.feed_forward(before)), None

    def _attend(self, x: Tensor, context: AttentionContext, layer: int) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, and what the feed-forward reads of it."""
        if not self.is_post_norm and self.attention_norm.runs_as_one(x):
            x, before = self.attention_norm.add(x, None)
            return self.feed_forward_norm.add(x, self.attention(before, context, layer))
        x = self.add_attention(x, self.attention(self.attention_input(x), context, layer))
        return x, self.feed_forward_input(x)

    def attention_input(self, x: Tensor) -> Tensor:
        """What attention reads of the residual stream."""
        return x if self.is_post_norm else self.attention_norm(x)

    def add_attention(self, x: Tensor, out: Tensor) -> Tensor:
        """The residual stream after attention has said `out`."""
        return x + (self.attention_norm(out) if self.is_post_norm else out)

    def feed_forward_input(self, x: Tensor) -> Tensor:
        """What the feed-forward reads of the residual stream."""
        return x if self.is_post_norm else self.feed_forward_norm(x)

    def add_feed_forward(self, x: Tensor, out: Tensor) -> Tensor:
        """The residual stream after the feed-forward has said `out`."""
        return x + (self.feed_forward_norm(out) if self.is_post_norm else out)
