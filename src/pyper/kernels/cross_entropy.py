"""The last product and its cross-entropy without ever holding all logits.

Tokens go through in chunks: a chunk's logits, their losses and gradients (written over the logits),
and the products of those with the states and the weight, are done before the next one begins. So
the gradients exist when the forward pass ends, and the backward pass scales them: a chunk's logits
are computed once. Liger's kernel works in the same way (arXiv:2410.10989).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyper.kernels import launch
from pyper.kernels.launch import block_of, wide

if launch.HAS_TRITON:
    import triton
    import triton.language as tl

# As many logits as a chunk holds by default; 256 MiB in bf16.
_CHUNK_LOGITS = 1 << 27


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Σ_n token_weights_n · cross-entropy(x_n · weightᵀ, targets_n): nats, a float32 scalar.

    x (N, D), weight (V, D), targets (N,) int64 below V, token_weights (N,), 1 without. The weight's
    gradient adds up in float32. `chunk_tokens` bounds the memory; default: 2²⁷ logits at a time.
    """
    if not launch.runs_triton(x):
        return linear_cross_entropy_torch(x, weight, targets, token_weights, chunk_tokens)
    out: Tensor = _LinearCrossEntropy.apply(x, weight, targets, token_weights, chunk_tokens)
    return out


def linear_cross_entropy_torch(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """The twin of `linear_cross_entropy`, in plain torch, all logits at once."""
    logits = F.linear(x, weight)
    logits = logits.to(wide(logits.dtype))
    if token_weights is None:
        return F.cross_entropy(logits, targets, reduction="sum")
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (losses * token_weights.to(losses.dtype)).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        token_weights: Tensor | None,
        chunk_tokens: int | None,
    ) -> Tensor:
        chunk = chunk_tokens or max(1, _CHUNK_LOGITS // len(weight))
        gradients = [ctx.needs_input_grad[i] for i in (0, 1)]
        weights = None if token_weights is None else token_weights.contiguous()
        loss, dx, dweight = chunked_cross_entropy(
            x.contiguous(), weight.contiguous(), targets.contiguous(), weights, chunk, *gradients
        )
        ctx.save_for_backward(dx, dweight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        grads = (_scaled(dx, dloss, dx.dtype), _scaled(dweight, dloss, ctx.weight_dtype))
        needed = ctx.needs_input_grad
        return *(g if n else None for g, n in zip(grads, needed, strict=False)), None, None, None


def _scaled(gradient: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    """The product in one pass, rounded once."""
    return torch.mul(gradient, by, out=torch.empty_like(gradient, dtype=dtype))


@torch.library.custom_op("pyper::chunked_cross_entropy", mutates_args=())
def chunked_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    chunk_tokens: int,
    want_dx: bool,
    want_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and where wanted (else empty) its gradients: x's, and the weight's in float32.

    All tensors contiguous.
    """
    dx = torch.empty_like(x) if want_dx else x.new_empty(0)
    dweight = weight.new_empty(weight.shape if want_dweight else 0, dtype=torch.float32)
    losses = x.new_empty(len(x), dtype=torch.float32)
    for start in range(0, len(x), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        logits = x[part] @ weight.T
        weights = None if token_weights is None else token_weights[part]
        _losses_and_gradient(logits, targets[part], weights, losses[part], want_dx or want_dweight)
        if want_dx:
            torch.mm(logits, weight, out=dx[part])
        if want_dweight:
            _add_product(dweight, logits.T, x[part], first=start == 0)
        del logits
    return losses.sum(), dx, dweight


@chunked_cross_entropy.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    chunk_tokens: int,
    want_dx: bool,
    want_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x) if want_dx else x.new_empty(0)
    dweight = weight.new_empty(weight.shape if want_dweight else 0, dtype=torch.float32)
    return x.new_empty((), dtype=torch.float32), dx, dweight


def _losses_and_gradient(
    logits: Tensor, targets: Tensor, weights: Tensor | None, losses: Tensor, want_gradient: bool
) -> None:
    """Fill losses (n,); where wanted, write the gradient of logits (n, V) over them."""
    n, V = logits.shape
    block = block_of(V, 4096)
    _cross_entropy[(n,)](
        *(logits, targets, weights, losses),
        V=V,
        HAS_WEIGHTS=weights is not None,
        WANT_GRADIENT=want_gradient,
        BLOCK_V=block,
        num_warps=max(1, min(8, block // 512)),
    )


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total (float32) += a · b, or = a · b the first time, without rounding to bf16 between."""
    if a.dtype == torch.float32:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    elif not a.is_cuda:  # torch's products with a wider result exist on CUDA alone
        torch.addmm(total, a.float(), b.float(), beta=0 if first else 1, out=total)
    elif first:
        torch.mm(a, b, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


if launch.HAS_TRITON:

    @triton.jit
    def _cross_entropy(
        logits_ptr,
        targets_ptr,
        weights_ptr,
        losses_ptr,
        V: tl.constexpr,
        HAS_WEIGHTS: tl.constexpr,
        WANT_GRADIENT: tl.constexpr,
        BLOCK_V: tl.constexpr,
    ):
        row = tl.program_id(0)
        logits_ptr += row.to(tl.int64) * V
        target = tl.load(targets_ptr + row)
        # Read before the gradient is written over it; NaN for a target that does not exist.
        known = (target >= 0) & (target < V)
        wanted = tl.load(logits_ptr + target, mask=known, other=float("nan")).to(tl.float32)
        weight = 1.0
        if HAS_WEIGHTS:
            weight = tl.load(weights_ptr + row).to(tl.float32)
        highest = float("-inf")
        total = 0.0
        for start in range(0, V, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            x = tl.load(logits_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(highest, tl.max(x, axis=0))
            total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher), axis=0)
            highest = higher
        log_total = highest + tl.log(total)
        tl.store(losses_ptr + row, weight * (log_total - wanted))
        if WANT_GRADIENT:
            for start in range(0, V, BLOCK_V):
                v = start + tl.arange(0, BLOCK_V)
                x = tl.load(logits_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
                gradient = tl.exp(x - log_total) - tl.where(v == target, 1.0, 0.0)
                tl.store(logits_ptr + v, weight * gradient, mask=v < V)
