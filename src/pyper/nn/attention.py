"""Multi-head (or grouped-query) self-attention with RoPE."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pyper.config import ExpertConfig
from pyper.nn.kv_cache import KVCache
from pyper.nn.norm import RMSNorm
from pyper.nn.rope import apply_rotation


@dataclass(frozen=True)
class AttentionContext:
    """What all layers of one forward pass share."""

    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    """(B, 1, T, S), True where a query may look; None is plain causal attention."""
    positions: Tensor | None = None
    """(B, T), where the cache stores these tokens."""
    cache: KVCache | None = None
    n_keys: int = 0
    """How much of the cache is looked at."""


class Attention(nn.Module):
    """softmax(q·kᵀ/√K)·v over the past, H query heads sharing `kv_heads` keys and values."""

    def __init__(self, config: ExpertConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.kv_heads
        width = config.n_heads * config.dim_per_head
        kv_width = config.kv_heads * config.dim_per_head
        self.widths = (width, kv_width, kv_width)
        # One product for all three: a third of the kernel launches, better shapes for the GEMM.
        self.qkv = nn.Linear(config.d_model, sum(self.widths), bias=config.attention_bias)
        self.out = nn.Linear(width, config.d_model, bias=False)
        self.q_norm = RMSNorm(config.dim_per_head, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.dim_per_head, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, context: AttentionContext, layer: int) -> Tensor:
        """Attend within x (B, T, D), and to the cached past where there is one."""
        query, key, value = self.qkv(x).split(self.widths, dim=-1)
        query = rearrange(query, "b t (h k) -> b h t k", h=self.n_heads)
        key = rearrange(key, "b t (h k) -> b h t k", h=self.n_kv_heads)
        value = rearrange(value, "b t (h k) -> b h t k", h=self.n_kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query = apply_rotation(query, context.cos, context.sin)
        key = apply_rotation(key, context.cos, context.sin)
        if context.cache is not None:
            key, value = self._through_cache(key, value, context, layer)
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=context.mask,
            is_causal=context.mask is None,
            enable_gqa=self.n_heads != self.n_kv_heads,
        )
        out: Tensor = self.out(rearrange(mixed, "b h t k -> b t (h k)"))
        return out

    def _through_cache(
        self, key: Tensor, value: Tensor, context: AttentionContext, layer: int
    ) -> tuple[Tensor, Tensor]:
        """Store the new keys and values; return all that may be attended to."""
        cache, positions = context.cache, context.positions
        assert cache is not None
        assert positions is not None
        cache.write(layer, key, value, positions)
        return cache.keys[layer, :, :, : context.n_keys], cache.values[
            layer, :, :, : context.n_keys
        ]


def document_mask(document: Tensor) -> Tensor:
    """(B, 1, T, T), True where key ≤ query in time and both lie in one document (B, T)."""
    same = document[:, None, :, None] == document[:, None, None, :]
    T = document.shape[-1]
    return same & torch.ones(T, T, dtype=torch.bool, device=document.device).tril()
