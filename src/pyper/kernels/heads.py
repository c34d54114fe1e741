"""Queries and keys of several experts: one product, then normalised and turned in one pass.

Each head is normalised on its own (QK-norm) and turned by its position (RoPE). The backward pass
reads the product and the gradients as attention leaves them, computes norms anew, and writes the
product's gradient once; values lie in the product as they are.
"""

from typing import Any

import torch
from torch import Tensor

from pyper.kernels import launch
from pyper.kernels.launch import block_of, wide
from pyper.kernels.rotary import turned_torch

if launch.HAS_TRITON:
    import triton

    from pyper.kernels.heads_kernel import _heads_gradient, _turned_heads

# Numbers of a tile: half of as many heads as that holds.
_TILE = 1024
# So many partial sums of the gains' gradients, whatever the GPU: results are to be the same.
_PARTS = 1024

Heads = tuple[Tensor, Tensor, Tensor]


def normed_heads(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gains: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    n_heads: int,
    length: int,
    eps: float,
) -> Heads:
    """Query (E·B, H, T, K), key and value (E·B, kv_heads, T, K) of x (E, B·T, D), T = `length`.

    weight (E, (H + 2·kv_heads)·K, D), queries first, values last, with its bias. gains (E, 2, K) of
    queries and keys, which are not normalised without. cos, signed sin: (T, 1, K), or
    (E·B, T, 1, K) where positions differ by row; both halves of a head turn by the same angles.
    """
    settings = (n_heads, length, eps)
    if not launch.runs_triton(x):
        return normed_heads_torch(x, weight, bias, gains, cos, sin, *settings)
    query, key, value = _NormedHeads.apply(x, weight, bias, gains, cos, sin, *settings)
    return query, key, value


def normed_heads_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gains: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    n_heads: int,
    length: int,
    eps: float,
) -> Heads:
    """The twin of `normed_heads`, in plain torch."""
    (E, N, _), K = x.shape, cos.shape[-1]
    heads = _product(x, weight, bias).view(E, N, -1, K)
    n_kv_heads = (heads.shape[2] - n_heads) // 2
    turned, value = heads.split((n_heads + n_kv_heads, n_kv_heads), dim=2)
    turned = turned.to(wide(x.dtype))
    if gains is not None:
        scale = (turned.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
        counts = torch.tensor((n_heads, n_kv_heads), device=x.device)
        turned = turned * scale * gains.repeat_interleave(counts, dim=1).unsqueeze(1)
    turned = turned.reshape(-1, length, *turned.shape[2:])
    turned = turned_torch(turned, cos, sin).to(x.dtype)
    query, key = turned.split((n_heads, n_kv_heads), dim=2)
    value = value.reshape(-1, length, n_kv_heads, K)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


class _NormedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gains: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        n_heads: int,
        length: int,
        eps: float,
    ) -> Heads:
        K = cos.shape[-1]
        cos, sin = cos.reshape(-1, K).float(), sin.reshape(-1, K).float()
        product = _product(x, weight, bias)
        n_kv_heads = (product.shape[-1] // K - n_heads) // 2
        turned = turned_heads(product, gains, cos, sin, n_heads, n_kv_heads, eps)
        ctx.save_for_backward(x, weight, product, gains, cos, sin)
        ctx.eps = eps
        heads = turned.view(-1, length, n_heads + n_kv_heads, K).transpose(1, 2)
        query, key = heads.split((n_heads, n_kv_heads), dim=1)
        value = product.view(-1, length, n_heads + 2 * n_kv_heads, K)[:, :, -n_kv_heads:]
        return query, key, value.transpose(1, 2)

    @staticmethod
    def backward(
        ctx: Any, dquery: Tensor, dkey: Tensor, dvalue: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, product, gains, cos, sin = ctx.saved_tensors
        dproduct, parts = heads_gradient(dquery, dkey, dvalue, product, gains, cos, sin, ctx.eps)
        dgains = None
        if gains is not None:
            dgains = parts.view(len(gains), -1, *gains.shape[1:]).sum(dim=1).to(gains.dtype)
        dbias = dproduct.sum(dim=1) if ctx.needs_input_grad[2] else None
        dx, dweight = torch.bmm(dproduct, weight), torch.bmm(dproduct.mT, x)
        return dx, dweight, dbias, dgains, None, None, None, None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return torch.bmm(x, weight.mT)
    return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)


@torch.library.custom_op("pyper::turned_heads", mutates_args=())
def turned_heads(
    product: Tensor,
    gains: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    n_heads: int,
    n_kv_heads: int,
    eps: float,
) -> Tensor:
    """Queries and keys (E, N, (H + kv_heads)·K) of the product, normalised and turned.

    product (E, N, (H + 2·kv_heads)·K); cos, sin (P, K) contiguous: row n is at position n mod P.
    """
    K, n_turned = cos.shape[1], n_heads + n_kv_heads
    product = product.contiguous()
    E, N, W = product.shape
    out = _turned_of(product, n_turned * K)
    block_k = block_of(K // 2, K)
    rows = max(1, _TILE // block_k)
    _turned_heads[(triton.cdiv(E * N * n_turned, rows),)](
        *(product, gains, cos, sin, out, E * N * n_turned, N, len(cos), eps),
        W=W,
        H=n_heads,
        TURNED=n_turned,
        HALF=K // 2,
        HAS_GAINS=gains is not None,
        ROWS=rows,
        BLOCK_K=block_k,
        num_warps=4,
    )
    return out


@turned_heads.register_fake
def _(
    product: Tensor,
    gains: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    n_heads: int,
    n_kv_heads: int,
    eps: float,
) -> Tensor:
    return _turned_of(product, (n_heads + n_kv_heads) * cos.shape[1])


@torch.library.custom_op("pyper::heads_gradient", mutates_args=())
def heads_gradient(
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
    product: Tensor,
    gains: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The product's gradient (E, N, W), and parts (E · P, 2, K) float32 of that of the gains.

    dquery (E·B, H, T, K), dkey, dvalue (E·B, kv_heads, T, K), in any order of their dimensions. The
    P parts of an expert are to be summed; without gains they are empty.
    """
    product = product.contiguous()
    dproduct, parts = _gradient_of(product, gains, cos)
    (E, N, W), K, (_, H, T, _) = product.shape, cos.shape[1], dquery.shape
    given = [part if part.stride(3) == 1 else part.contiguous() for part in (dquery, dkey, dvalue)]
    n_rows = N * (W // K)
    rows, programs = _split_of(E, n_rows, K)
    _heads_gradient[(programs, E)](
        *(argument for part in given for argument in (part, *part.stride()[:3])),
        *(product, gains, cos, sin, dproduct, parts, n_rows, T, len(cos), eps),
        H=H,
        KV_HEADS=dkey.shape[1],
        HALF=K // 2,
        HAS_GAINS=gains is not None,
        PARTS=programs,
        ROWS=rows,
        BLOCK_K=block_of(K // 2, K),
        num_warps=4,
    )
    return dproduct, parts


@heads_gradient.register_fake
def _(
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
    product: Tensor,
    gains: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return _gradient_of(product, gains, cos)


def _turned_of(product: Tensor, width: int) -> Tensor:
    return product.new_empty(*product.shape[:2], width)


def _gradient_of(product: Tensor, gains: Tensor | None, cos: Tensor) -> tuple[Tensor, Tensor]:
    (E, N, W), K = product.shape, cos.shape[1]
    n_parts = 0 if gains is None else E * _split_of(E, N * (W // K), K)[1]
    parts = product.new_empty(n_parts, 2, K, dtype=torch.float32)
    return product.new_empty(product.shape), parts


def _split_of(n_experts: int, n_rows: int, head_dim: int) -> tuple[int, int]:
    """Heads that a program takes at a time, and programs of each expert's `n_rows` heads."""
    rows = max(1, _TILE // block_of(head_dim // 2, head_dim))
    return rows, min(max(1, _PARTS // n_experts), -(-n_rows // rows))
