"""One new token per text attends to its past, which lies in pages of a cache.

The past is cut into parts that are read side by side (split-KV, "Flash-Decoding"): one text with
16 heads would otherwise keep 16 of a GPU's hundred processors busy. Only what a text has is read.
Queries and keys may come as the product wrote them: QK-norm and RoPE are done where they are read.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyper.kernels import launch
from pyper.kernels.launch import block_of
from pyper.kernels.overlap import overlap_options

if launch.HAS_TRITON:
    from pyper.kernels.paged_attention_kernel import attend_part, join_parts

# Programs that fill a large GPU; more parts than this do not pay for putting them together.
_PROGRAMS, _MOST_PARTS = 512, 16
# Of few texts, half as many do, with twice as much on its way.
_FEW_PROGRAMS = 256
# Rows of a product of matrices, at least.
_QUERIES = 16


@dataclass(frozen=True)
class Turn:
    """What happens to queries and keys before they meet: QK-norm, if any, then RoPE."""

    cos: Tensor
    """(S, K) float32, of every position."""
    sin: Tensor
    """(S, K) float32, that of the first half negative."""
    gains: tuple[Tensor, Tensor] | None = None
    """Of the norms of queries and keys, (K,) each."""
    eps: float = 0.0


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    positions: Tensor,
    page_tokens: int,
    turn: Turn | None = None,
    *,
    tickets: Tensor | None = None,
    overlap: bool = False,
) -> Tensor:
    """Store key and value (B, kv_heads, K) of one token per text; what query (B, H, K) reads.

    The three may be parts of wider rows, heads side by side. keys, values: (n_slots, kv_heads, K),
    changed in place. pages: (B, n_pages) int64, those of each text in order, `page_tokens` slots
    each; positions: (B,) int64, of the tokens in their texts. turn: None where query and key are
    turned already. The softmax is in float32. Returns (B, H, K) in the type of the query.
    tickets: (B · kv_heads,) int32 zeros, and zero again afterwards: the last part of a text and
    head puts all of them together, where otherwise a kernel of its own must. With them short
    pasts have fewer parts.
    overlap: read positions, pages and cache while the kernel before still runs; that one must not
    have written them.
    """
    if not launch.runs_triton(query):
        return paged_attention_torch(
            query, key, value, keys, values, pages, positions, page_tokens, turn
        )
    cos, sin = (turn.cos, turn.sin) if turn else (None, None)
    gains, eps = (turn.gains or (None, None), turn.eps) if turn else ((None, None), 0.0)
    return _paged_attention_op(
        *(query, key, value, keys, values, pages, positions, page_tokens, cos, sin, *gains, eps),
        tickets,
        overlap,
    )


def paged_attention_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    positions: Tensor,
    page_tokens: int,
    turn: Turn | None = None,
) -> Tensor:
    """The twin of `paged_attention`, in plain torch."""
    if turn is not None:
        query = _turned_torch(query, turn, positions, 0)
        key = _turned_torch(key, turn, positions, 1)
    page = pages.gather(1, positions[:, None] // page_tokens).squeeze(1)
    slot = page * page_tokens + positions % page_tokens
    keys.index_copy_(0, slot, key)
    values.index_copy_(0, slot, value)
    within = torch.arange(page_tokens, device=pages.device)
    slots = (pages[..., None] * page_tokens + within).flatten(1)  # (B, S)
    mask = torch.arange(slots.shape[1], device=pages.device) <= positions[:, None]
    out = F.scaled_dot_product_attention(
        query.unsqueeze(2),
        keys[slots].transpose(1, 2),
        values[slots].transpose(1, 2),
        attn_mask=mask[:, None, None],
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.squeeze(2)


def _turned_torch(x: Tensor, turn: Turn, positions: Tensor, which: int) -> Tensor:
    """Queries (0) or keys (1), (B, heads, K), normalised and turned."""
    if turn.gains is not None:
        x = F.rms_norm(x, (x.shape[-1],), turn.gains[which], turn.eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = turn.cos[positions].unsqueeze(1), turn.sin[positions].unsqueeze(1)
    return (wide * cos + wide.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


class Parts(NamedTuple):
    """What a program takes."""

    n_parts: int
    """Of a text and head, at most."""
    tokens: int
    """At a time."""
    stages: int
    """Three have one block of keys and values on its way, five two: pages come a stage before."""
    warps: int
    least_blocks: int = 1
    """Of a part: to put parts together takes as long as a program with less to read."""
    heads: int = 1
    """Of keys, read in turns."""


def _parts(n_texts: int, n_kv_heads: int, row_bytes: int, groups: int) -> Parts:
    """Four programs share a processor, and its memory; of few texts two, with more on its way."""
    n_heads, long = n_texts * n_kv_heads, row_bytes <= 256  # rows of which there is room for 64
    if long and n_texts > 1 and n_heads <= _FEW_PROGRAMS:
        n_parts = block_of(_FEW_PROGRAMS // n_heads, _MOST_PARTS)
        return Parts(n_parts, 64, 5, 4, least_blocks=max(n_heads // 16, 1))
    n_parts = block_of(max(_PROGRAMS // n_heads, 1), _MOST_PARTS)
    # No more programs than run at a time: going from head to head, reading never starts anew.
    most = 1 << max(_QUERIES // groups, 1).bit_length() - 1
    heads = math.gcd(block_of(max(n_heads // _PROGRAMS, 1), most), n_kv_heads)
    # Short parts fill no long block.
    return Parts(n_parts, 64 if n_parts == 1 and long else 32, 3, 4, heads=heads)


@torch.library.custom_op("pyper::paged_attention", mutates_args=("keys", "values", "tickets"))
def _paged_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    positions: Tensor,
    page_tokens: int,
    cos: Tensor | None,
    sin: Tensor | None,
    query_gain: Tensor | None,
    key_gain: Tensor | None,
    eps: float,
    tickets: Tensor | None,
    overlap: bool,
) -> Tensor:
    """All but the first three and `pages` contiguous; of those, what one text has."""
    (B, H, K), n_kv_heads = query.shape, key.shape[1]
    groups, width = H // n_kv_heads, block_of(K, 1 << 20)
    parts = _parts(B, n_kv_heads, width * query.element_size(), groups)
    n_parts, heads = parts.n_parts, parts.heads
    out = query.new_empty(B, H, K)
    shape = (B, H, n_parts)
    part = out if n_parts == 1 else query.new_empty(*shape, K, dtype=torch.float32)
    log_sum = query.new_empty(shape, dtype=torch.float32)
    options = overlap_options(overlap, query.device)
    attend_part[(B, n_kv_heads // heads, n_parts)](
        *(query, key, value, keys, values, pages, positions, part, log_sum, out, tickets),
        *(cos, sin, query_gain, key_gain),
        *(query.stride(0), key.stride(0), value.stride(0), pages.stride(0), K**-0.5, eps),
        HAS_TURN=cos is not None,
        HAS_NORM=query_gain is not None,
        HAS_TICKETS=tickets is not None and n_parts > 1,
        MOST_PARTS=n_parts,
        LEAST_BLOCKS=parts.least_blocks,
        K=K,
        GROUPS=groups,
        PAGE=page_tokens,
        HEADS=heads,
        BLOCK_G=max(block_of(heads * groups, 1 << 20), _QUERIES),
        BLOCK_S=parts.tokens,
        BLOCK_K=max(width, 16),
        STAGES=parts.stages,
        num_warps=parts.warps,
        num_stages=parts.stages,
        **options,
    )
    if n_parts > 1 and tickets is None:
        sizes = {"K": K, "N_PARTS": n_parts, "BLOCK_K": width}
        join_parts[(B * H,)](*(part, log_sum, out), **sizes, num_warps=2, **options)
    return out


@_paged_attention_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    positions: Tensor,
    page_tokens: int,
    cos: Tensor | None,
    sin: Tensor | None,
    query_gain: Tensor | None,
    key_gain: Tensor | None,
    eps: float,
    tickets: Tensor | None,
    overlap: bool,
) -> Tensor:
    return query.new_empty(query.shape)
