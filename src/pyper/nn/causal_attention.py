"""softmax(q·kᵀ/√K)·v over the past, by the faster of two ways."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# PyTorch's fused attention is slow in bfloat16 on CPUs, its backward pass above all: at 256 tokens
# the products written out take less than half of its time. Scores grow with T²; beyond this length
# they no longer stay in the cache.
_LONGEST_WRITTEN_OUT = 1024
# Queries are read in blocks, so that half of the scores (the future) are never computed.
_BLOCK = 128


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Attend from query (B, H, T, K) to key and value (B, kv_heads, T, K); (B, H, T, K).

    mask: (B, 1, T, T), True where a query may look, itself included and nothing of the future;
    None: all of the past.
    """
    groups = query.shape[1] // key.shape[1]
    short = query.shape[2] <= _LONGEST_WRITTEN_OUT
    if not (short and query.device.type == "cpu" and query.dtype == torch.bfloat16):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=groups > 1
        )
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out: Tensor = WrittenOutAttention.apply(query, key, value, mask)  # type: ignore[no-untyped-call]
    return out


class WrittenOutAttention(torch.autograd.Function):
    """Batched products and a softmax (float32 inside), block by block of queries.

    All of shape (B, H, T, K). The derivative is arXiv:2205.14135, appendix B.2, with the
    probabilities kept instead of computed again.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        n_heads = query.shape[1]
        ctx.shape, scale = query.shape, query.shape[-1] ** -0.5
        query, key, value = (x.reshape(-1, *x.shape[2:]) for x in (query, key, value))
        out, kept = torch.empty_like(query), []
        for start, end in _blocks(query.shape[1]):
            scores = _scaled_product(query[:, start:end], key[:, :end].mT, scale)
            if mask is None:
                scores[..., start:] += _future(end - start, query)
            else:
                by_head = scores.unflatten(0, (-1, n_heads))
                by_head.masked_fill_(~mask[:, :, start:end, :end], -torch.inf)
            kept.append(scores.softmax(dim=-1))
            torch.bmm(kept[-1], value[:, :end], out=out[:, start:end])
        ctx.save_for_backward(query, key, value, *kept)
        return out.view(ctx.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *kept = ctx.saved_tensors
        grad, scale = grad.reshape(query.shape), query.shape[-1] ** -0.5
        to_query, to_key, to_value = (torch.zeros_like(x) for x in (query, key, value))
        for (start, end), probs in zip(_blocks(query.shape[1]), kept, strict=True):
            block_grad = grad[:, start:end]
            to_probs = block_grad @ value[:, :end].mT
            to_scores = torch._softmax_backward_data(to_probs, probs, -1, probs.dtype)
            to_query[:, start:end] = _scaled_product(to_scores, key[:, :end], scale)
            to_key[:, :end].baddbmm_(to_scores.mT, query[:, start:end], alpha=scale)
            to_value[:, :end].baddbmm_(probs.mT, block_grad)
        to_query, to_key, to_value = (x.view(ctx.shape) for x in (to_query, to_key, to_value))
        return to_query, to_key, to_value, None


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + _BLOCK, length)) for start in range(0, length, _BLOCK)]


def _future(n: int, like: Tensor) -> Tensor:
    """(n, n): −∞ where the key lies after the query, else 0."""
    return torch.full((n, n), -torch.inf, device=like.device, dtype=like.dtype).triu(1)


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale · left @ right, in one pass over the result."""
    return torch.baddbmm(left.new_empty(1, 1, 1), left, right, beta=0, alpha=scale)
