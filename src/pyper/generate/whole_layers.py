"""All layers for one token of one text as a single kernel: see `kernels/whole_token.py`."""

import torch
from torch import Tensor

from pyper.generate.narrow_weights import thin_weight
from pyper.generate.thin_layers import ThinLayers
from pyper.kernels.row_linear import takes
from pyper.kernels.whole_token import TokenLayer, TokenShape, WholeToken, has_programs
from pyper.nn import PAGE_TOKENS, KVStore, Transformer
from pyper.nn.attention import Attention
from pyper.nn.block import Block
from pyper.nn.feed_forward import FeedForward
from pyper.nn.rope import rotation


class WholeLayers:
    """The same function as `ThinLayers`, of one text."""

    def __init__(self, model: Transformer, store: KVStore, max_tokens: int) -> None:
        """Keeps no weight, only where they are: the model must not move."""
        self._token = whole_token_of(model, store, max_tokens)

    @staticmethod
    def pay_for(model: Transformer, batch: int) -> bool:
        """Whether a single kernel can be all layers, where the model is."""
        if batch != 1 or not ThinLayers.pay_for(model, batch):
            return False
        if not has_programs(model.device, model.config.kv_heads):
            return False
        parts = [_parts_of(block) for block in model.blocks]
        maps = [m for a, f in parts for m in (a.qkv, a.out, f.up, f.down)]
        return all(takes(thin_weight(m).weight) for m in (*maps, model.head))

    def __call__(
        self, model: Transformer, store: KVStore, tokens: Tensor, positions: Tensor, pages: Tensor
    ) -> Tensor:
        """log p (1, V) float32 after token (1,) at position (1,) of a text in pages (1, n)."""
        logits = self._token(model.embedding(tokens)[0], pages[0], positions)
        return logits.float().log_softmax(dim=-1).unsqueeze(0)


def whole_token_of(model: Transformer, store: KVStore, max_tokens: int) -> WholeToken:
    """The kernel of a model and the cache that it writes."""
    c = model.config
    every = torch.arange(max_tokens, device=model.device)
    cos, sin = rotation(every, c.dim_per_head, c.rope_theta, c.rope_scaling)
    # A layer without positions turns by nothing.
    still = torch.ones_like(cos), torch.zeros_like(sin)
    layers = [
        _layer(block, (cos, sin), still, keys, values)
        for block, keys, values in zip(model.blocks, store.keys, store.values, strict=True)
    ]
    shape = TokenShape(
        n_heads=c.n_heads,
        n_kv_heads=c.kv_heads,
        dim_per_head=c.dim_per_head,
        ff_dim=c.ff_dim,
        activation=c.activation,
        eps=c.norm_eps,
        page_tokens=PAGE_TOKENS,
    )
    return WholeToken(layers, model.norm.weight, thin_weight(model.head), shape)


def _layer(
    block: torch.nn.Module,
    turn: tuple[Tensor, Tensor],
    still: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
) -> TokenLayer:
    assert isinstance(block, Block)
    attention, inner = _parts_of(block)
    cos, sin = turn if attention.rotates else still
    gains = None
    if attention.q_norm is not None and attention.k_norm is not None:
        gains = (attention.q_norm.weight, attention.k_norm.weight)
    return TokenLayer(
        attention_gain=block.attention_norm.weight,
        qkv=thin_weight(attention.qkv),
        qk_gains=gains,
        cos=cos,
        sin=sin,
        keys=keys,
        values=values,
        out=thin_weight(attention.out),
        feed_forward_gain=block.feed_forward_norm.weight,
        up=thin_weight(inner.up),
        down=thin_weight(inner.down),
    )


def _parts_of(block: torch.nn.Module) -> tuple[Attention, FeedForward]:
    assert isinstance(block, Block)
    assert isinstance(block.attention, Attention)
    assert isinstance(block.feed_forward, FeedForward)
    return block.attention, block.feed_forward
