"""Pyper's transformers in plain torch: a decoder, which may have experts inside its layers.

Shapes: B batch, T new tokens, S all tokens, D width, H heads, K head_dim, V vocabulary, E experts.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pyper_feed_forward import FeedForward, SparseFeedForward, wide_linear


class History:
    """The tokens (B, S) that were read so far, and which of them are no padding."""

    def __init__(self, tokens: Tensor, real: Tensor) -> None:
        self.tokens, self.real = tokens, real

    @classmethod
    def of(cls, tokens: Tensor, attention_mask: Tensor | None, before: "History | None"):
        """After more tokens (B, T); of the mask only their part is read."""
        T = tokens.shape[1]
        real = torch.ones_like(tokens, dtype=torch.bool)
        if attention_mask is not None:
            real = attention_mask[:, -T:].bool()
        if before is None:
            return cls(tokens, real)
        return cls(torch.cat([before.tokens, tokens], 1), torch.cat([before.real, real], 1))

    @property
    def position(self) -> Tensor:
        """(B, S), of each token in its text; 0 for padding before it."""
        return (self.real.long().cumsum(1) - 1).clamp(min=0)


class KeyValues:
    """Keys and values (B, kv_heads, S, K) of one decoder's attentions."""

    def __init__(self) -> None:
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, slot: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All of them, after those of T more tokens."""
        if slot in self.pairs:
            old_key, old_value = self.pairs[slot]
            key, value = torch.cat([old_key, key], 2), torch.cat([old_value, value], 2)
        self.pairs[slot] = key, value
        return key, value

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        for slot, (key, value) in self.pairs.items():
            self.pairs[slot] = key[rows.to(key.device)], value[rows.to(value.device)]


class Decoder(nn.Module):
    """Embedding → blocks → norm → head. `shape` is a dictionary of the model's config.json."""

    def __init__(self, shape: dict) -> None:
        super().__init__()
        self.shape = s = SimpleNamespace(**shape)
        self.embedding = nn.Embedding(s.vocab_size, s.d_model)
        self.blocks = nn.ModuleList(Block(s, layer) for layer in range(s.n_layers))
        self.norm = RMSNorm(s.d_model, s.norm_eps)
        self.head = None
        if not s.tie_embeddings:
            self.head = nn.Linear(s.d_model, s.vocab_size, bias=False)

    def states(self, history: History, n_new: int, cache: KeyValues | None = None) -> Tensor:
        """What the head reads, (B, T, D), of the last `n_new` tokens."""
        document, position = self._documents(history)
        visible = _visible(document, n_new)
        cos, sin = rotation(position[:, -n_new:], self.shape)
        x = self.embedding(history.tokens[:, -n_new:])
        for layer, block in enumerate(self.blocks):
            x = block(x, cos, sin, visible, cache, layer)
        return self.norm(x)

    def logits(self, states: Tensor) -> Tensor:
        """(B, T, V)."""
        return F.linear(states, (self.head or self.embedding).weight)

    def _documents(self, history: History) -> tuple[Tensor, Tensor]:
        """Number of its document (−1: padding) and position in it, (B, S), of every token."""
        position, real = history.position, history.real
        document = torch.zeros_like(position)
        if not self.shape.attend_across_documents:
            starts = real & (history.tokens == self.shape.bos_id)
            document = starts.long().cumsum(1)
            position = position - torch.where(starts, position, 0).cummax(1).values
        return document.masked_fill(~real, -1), position


def _visible(document: Tensor, n_new: int) -> Tensor:
    """(B, 1, T, S): which keys a query may look at; padding looks at itself, for want of others."""
    S = document.shape[1]
    query = document[:, -n_new:]
    at = torch.arange(S, device=document.device)
    behind = at[None, :] - at[-n_new:, None]  # 0: itself
    same = (query[:, :, None] == document[:, None, :]) & (query >= 0)[:, :, None]
    return ((same & (behind <= 0)) | (behind == 0))[:, None]


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); or x + norm(…(x)) (`post`)."""

    def __init__(self, s: SimpleNamespace, layer: int) -> None:
        super().__init__()
        sparse = s.sparse
        soft = sparse is not None and sparse["attention_experts"] > 0
        routed = sparse is not None and (layer + 1) % sparse["every"] == 0
        self.is_post_norm = s.norm_position == "post"
        self.attention_norm = RMSNorm(s.d_model, s.norm_eps)
        self.attention = SoftAttention(s, layer) if soft else Attention(s, layer)
        self.feed_forward_norm = RMSNorm(s.d_model, s.norm_eps)
        self.feed_forward = SparseFeedForward(s) if routed else FeedForward(s, s.d_ff)

    def forward(self, x, cos, sin, visible, cache, layer):
        if self.is_post_norm:
            x = x + self.attention_norm(self.attention(x, cos, sin, visible, cache, layer))
            return x + self.feed_forward_norm(self.feed_forward(x))
        x = x + self.attention(self.attention_norm(x), cos, sin, visible, cache, layer)
        return x + self.feed_forward(self.feed_forward_norm(x))


class RMSNorm(nn.Module):
    """w · x / √(mean(x²) + eps), the mean in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (wide * scale).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Causal multi-head (or grouped-query) attention with RoPE."""

    def __init__(self, s: SimpleNamespace, layer: int) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = s.n_heads, s.n_kv_heads, s.head_dim
        self.widths = [n * s.head_dim for n in (s.n_heads, s.n_kv_heads, s.n_kv_heads)]
        self.qkv = nn.Linear(s.d_model, sum(self.widths), bias=s.attention_bias)
        self.out = nn.Linear(self.widths[0], s.d_model, bias=s.attention_output_bias)
        self.by_head = s.qk_norm_over == "head"  # the mean of QK-norm, or over all heads
        sizes = [s.head_dim] * 2 if self.by_head else self.widths[:2]
        self.q_norm, self.k_norm = (
            RMSNorm(size, s.norm_eps) if s.qk_norm else None for size in sizes
        )
        self.rotates = layer not in s.no_rope_layers

    def forward(self, x, cos, sin, visible, cache, slot):
        query, key, value = self.qkv(x).split(self.widths, dim=-1)
        query = self._heads(query, self.q_norm, cos, sin)
        key = self._heads(key, self.k_norm, cos, sin)
        value = value.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if cache is not None:
            key, value = cache.extend(slot, key, value)
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, enable_gqa=self.n_kv_heads != self.n_heads
        )
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x, norm, cos, sin):
        """(B, T, H·K) as heads (B, H, T, K), normalised and turned."""
        if norm is not None and not self.by_head:
            x = norm(x)
        x = x.unflatten(-1, (-1, self.head_dim))
        if norm is not None and self.by_head:
            x = norm(x)
        return (rotate(x, cos, sin) if self.rotates else x).transpose(1, 2)


class SoftAttention(nn.Module):
    """Σ_e gate_e · attention_e(x): all attentions run, softmax gates mix them."""

    def __init__(self, s: SimpleNamespace, layer: int) -> None:
        super().__init__()
        n_experts = s.sparse["attention_experts"]
        self.router = nn.Linear(s.d_model, n_experts, bias=False)
        self.experts = nn.ModuleList(Attention(s, layer) for _ in range(n_experts))

    def forward(self, x, cos, sin, visible, cache, layer):
        gates = wide_linear(x, self.router.weight).softmax(-1)
        out = 0.0
        for number, expert in enumerate(self.experts):
            slot = layer * len(self.experts) + number
            out = out + gates[..., number, None] * expert(x, cos, sin, visible, cache, slot)
        return out.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i+K/2}) of x (B, T, H, K), in float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * cos + wide.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


def rotation(position: Tensor, s: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """cos and signed sin, (B, T, 1, K) float32, of positions (B, T)."""
    frequencies = torch.tensor(s.rope_frequencies, dtype=torch.float32, device=position.device)
    angles = position[..., None, None].float() * frequencies
    cos, sin = angles.cos() * s.rope_scale, angles.sin() * s.rope_scale
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
