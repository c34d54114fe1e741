"""All layers for one token of each of B texts, from the modules that also train."""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from pyper.kernels import paged_attention
from pyper.nn import PAGE_TOKENS, KVStore, Transformer
from pyper.nn.attention import Attention
from pyper.nn.block import Block

Part = TypeVar("Part", bound=Callable[..., Any])


class UsualLayers:
    """Blocks as they are, with attention to the pages between their halves."""

    def __init__(self, cos: Tensor, sin: Tensor, *, compiled: bool) -> None:
        """cos, sin: (S, K), of every position."""
        self._cos, self._sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        self._before = _compiled(before) if compiled else before
        self._after = _compiled(after) if compiled else after
        self._last = _compiled(last) if compiled else last

    def __call__(
        self, model: Transformer, store: KVStore, tokens: Tensor, positions: Tensor, pages: Tensor
    ) -> Tensor:
        """log p (B, V) float32 after tokens (B,) at positions (B,) of texts in pages (B, n)."""
        x = model.embedding(tokens)
        cos, sin = self._cos[positions], self._sin[positions]
        for layer, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            query, key, value = self._before(block, x, cos, sin)
            keys, values = store.keys[layer], store.values[layer]
            mixed = paged_attention(query, key, value, keys, values, pages, positions, PAGE_TOKENS)
            x = self._after(block, x, mixed)
        return self._last(model, x)


def before(block: Block, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query (B, H, K), key and value (B, kv_heads, K) of the residual stream x (B, D)."""
    attention = block.attention
    assert isinstance(attention, Attention)
    heads = attention.query_key_value(block.attention_input(x)[None], cos, sin)
    query, key, value = (t[0].transpose(0, 1).contiguous() for t in heads)
    return query, key, value


def after(block: Block, x: Tensor, mixed: Tensor) -> Tensor:
    """The residual stream (B, D) after the block, of what the heads read (B, H, K)."""
    attention = block.attention
    assert isinstance(attention, Attention)
    x = block.add_attention(x, attention.out(mixed.flatten(1)))
    return block.add_feed_forward(x, block.feed_forward(block.feed_forward_input(x)))


def last(model: Transformer, x: Tensor) -> Tensor:
    """log p (B, V) float32 of the residual stream after the last block."""
    out: Tensor = model.head(model.norm(x)).float().log_softmax(dim=-1)
    return out


@cache
def _compiled(part: Part) -> Part:
    """Norms, products and activations in few kernels; all layers and experts share them.

    One compiled function for each part: all steps find each other's kernels there. Coordinate
    descent is what makes products with one row (matrix times vector) reach the speed of
    the memory: only with it does Inductor write them itself.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    options: dict[str, Any] = {"coordinate_descent_tuning": True}
    return cast(Part, torch.compile(part, dynamic=False, options=options))
