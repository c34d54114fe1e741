"""Multi-head (or grouped-query) self-attention with RoPE."""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from pyper.config import ExpertConfig
from pyper.kernels import launch, normed_heads, rotated_heads
from pyper.kernels.fp8_heads import fp8_rotated_heads
from pyper.nn.causal_attention import causal_attention
from pyper.nn.fp8_linear import Fp8Linear
from pyper.nn.kv_cache import CachePass
from pyper.nn.norm import RMSNorm, rms_norm
from pyper.nn.rope import apply_rotation
from pyper.nn.sparse_feed_forward import Rule


@dataclass(frozen=True)
class AttentionContext:
    """What all layers of one forward pass share."""

    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    """(B, 1, T, S), True where a query may look; None is plain causal attention."""
    cached: CachePass | None = None
    """Keys and values come from and go to a cache; B is then 1, the tokens of any texts flat."""
    rule: Rule | None = None
    """How sparse feed-forwards choose; None as training or evaluation does."""
    padding: Tensor | None = None
    """(B, T), True where there is no token: sparse feed-forwards leave those out."""


class Attention(nn.Module):
    """softmax(q·kᵀ/√K)·v over the past, H query heads sharing `kv_heads` keys and values."""

    def __init__(self, config: ExpertConfig, layer: int) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.kv_heads
        width = config.n_heads * config.dim_per_head
        kv_width = config.kv_heads * config.dim_per_head
        self.widths = (width, kv_width, kv_width)
        # One product for all three: a third of the kernel launches, better shapes for the GEMM.
        self.qkv = nn.Linear(config.d_model, width + 2 * kv_width, bias=config.attention_bias)
        self.out = nn.Linear(width, config.d_model, bias=config.attention_output_bias)
        self.has_bias = config.attention_bias
        self.by_head = config.qk_norm_over == "head"
        gains = (config.dim_per_head,) * 2 if self.by_head else (width, kv_width)
        self.q_norm, self.k_norm = (
            RMSNorm(size, config.norm_eps) if config.qk_norm else None for size in gains
        )
        self.rotates = layer not in config.no_rope_layers

    def forward(self, x: Tensor, context: AttentionContext, layer: int) -> Tensor:
        """Attend within x (B, T, D), and to the cached past where there is one."""
        query, key, value = self.query_key_value(x, context.cos, context.sin)
        if context.cached is not None:
            mixed = context.cached.attend(layer, query, key, value)
        else:
            mixed = causal_attention(query, key, value, context.mask)
        out: Tensor = self.out(rearrange(mixed, "b h t k -> b t (h k)"))
        return out

    def query_key_value(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query (B, H, T, K), key and value (B, kv_heads, T, K) of x (B, T, D), turned.

        A layer without positions leaves them as they are.
        """
        if self.runs_as_one(x):
            return self._heads_as_one(x, cos, sin)
        if self.runs_as_one_in_fp8(x):
            turns = (cos, sin, self.n_heads, self.n_kv_heads)
            return fp8_rotated_heads(x, self.qkv.weight, *turns)
        # Queries and keys are normalised and turned together: fewer, larger operations.
        width, kv_width, _ = self.widths
        query_key, value = self.qkv(x).split((width + kv_width, kv_width), dim=-1)
        if not self.by_head:
            query_key = self._normalize_whole(query_key)
        query_key = rearrange(query_key, "b t (h k) -> b t h k", h=self.n_heads + self.n_kv_heads)
        if self.by_head:
            query_key = self._normalize(query_key)
        if self.rotates:
            query_key = apply_rotation(query_key, cos, sin)
        query_key = rearrange(query_key, "b t h k -> b h t k")
        query, key = query_key.split((self.n_heads, self.n_kv_heads), dim=1)
        value = rearrange(value, "b t (h k) -> b h t k", h=self.n_kv_heads)
        return query, key, value

    def runs_as_one(self, x: Tensor) -> bool:
        """Whether training on x normalises and turns heads in one pass each way, by kernels."""
        plain = type(self.qkv) is nn.Linear and self.rotates
        known = self.q_norm is None or self.by_head
        return self.training and plain and known and launch.runs_triton(x)

    def runs_as_one_in_fp8(self, x: Tensor) -> bool:
        """The same of products of 8-bit floats, without QK-norm."""
        narrow = isinstance(self.qkv, Fp8Linear) and self.qkv.takes(x) and self.rotates
        return narrow and self.q_norm is None and not self.has_bias and launch.runs_triton(x)

    def _heads_as_one(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = self.qkv.weight, self.qkv.bias
        if self.q_norm is None or self.k_norm is None:
            return rotated_heads(x, weight, bias, cos, sin, self.n_heads, self.n_kv_heads)
        gains = torch.stack((self.q_norm.weight, self.k_norm.weight))
        # Of one expert.
        stacked = (
            x.reshape(1, -1, x.shape[-1]),
            weight[None],
            None if bias is None else bias[None],
        )
        settings = (self.n_heads, x.shape[1], self.q_norm.eps)
        return normed_heads(*stacked, gains[None], cos, sin, *settings)

    def _normalize(self, query_key: Tensor) -> Tensor:
        """QK-norm of queries and keys (B, T, H + kv_heads, K), each with its own gain."""
        if self.q_norm is None or self.k_norm is None:
            return query_key
        gains = (
            self.q_norm.weight.expand(self.n_heads, -1),
            self.k_norm.weight.expand(self.n_kv_heads, -1),
        )
        return rms_norm(query_key, torch.cat(gains), self.q_norm.eps)

    def _normalize_whole(self, query_key: Tensor) -> Tensor:
        """QK-norm over all query heads and all key heads of a token (B, T, (H + kv_heads)·K)."""
        assert self.q_norm is not None
        assert self.k_norm is not None
        query, key = query_key.split(self.widths[:2], dim=-1)
        return torch.cat((self.q_norm(query), self.k_norm(key)), dim=-1)


def document_mask(document: Tensor) -> Tensor:
    """(B, 1, T, T), True where key ≤ query in time and both lie in one document (B, T)."""
    same = document[:, None, :, None] == document[:, None, None, :]
    T = document.shape[-1]
    return same & torch.ones(T, T, dtype=torch.bool, device=document.device).tril()
