"""Router logits in float32 and their gates, from one read of the tokens.

The reference casts every token to float32 first: three more passes over x (N, D). Here bf16 tokens
meet the weight as a sum of three bf16 terms, which together hold all 24 bits of a float32: tensor
cores do the work and nothing is rounded but the sums.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyper.config.sparse import Gate
from pyper.kernels import launch
from pyper.kernels.launch import block_of, wide

if launch.HAS_TRITON:
    import triton
    import triton.language as tl


def router_gates(x: Tensor, weight: Tensor, gate: Gate = "softmax") -> tuple[Tensor, Tensor]:
    """Logits x · weightᵀ and gates, both (N, E) float32, of x (N, D) and weight (E, D).

    Gates are over the experts of one token: a softmax (arXiv:2202.09368, eq. 1), or sigmoids.
    """
    if not launch.runs_triton(x):
        return router_gates_torch(x, weight, gate)
    logits, gates = _RouterGates.apply(x, weight, gate)
    return logits, gates


def router_gates_torch(x: Tensor, weight: Tensor, gate: Gate = "softmax") -> tuple[Tensor, Tensor]:
    """The twin of `router_gates`, in plain torch."""
    dtype = wide(x.dtype)
    logits = F.linear(x.to(dtype), weight.to(dtype))
    return logits, logits.softmax(dim=-1) if gate == "softmax" else logits.sigmoid()


class _RouterGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gate: Gate) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        logits, gates = router_forward(x, weight.contiguous(), gate == "softmax")
        ctx.save_for_backward(x, weight, gates)
        ctx.softmax = gate == "softmax"
        return logits, gates

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor, dgates: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, gates = ctx.saved_tensors
        total = logits_gradient(dlogits.contiguous(), dgates.contiguous(), gates, ctx.softmax)
        dx = router_input_gradient(total, weight.contiguous(), x.dtype)
        return dx, router_weight_gradient(total, x).to(weight.dtype), None


@torch.library.custom_op("pyper::router_forward", mutates_args=())
def router_forward(x: Tensor, weight: Tensor, softmax: bool) -> tuple[Tensor, Tensor]:
    """Logits and gates (N, E) of contiguous x (N, D), weight (E, D); no gradient."""
    (N, D), E = x.shape, len(weight)
    logits, gates = (x.new_empty(N, E, dtype=torch.float32) for _ in range(2))
    narrow = x.dtype == torch.bfloat16
    rows, block_e = (64 if narrow else 32), max(block_of(E, 1024), 16)
    cols = 128 if block_e <= 32 else 64
    _router_forward[(triton.cdiv(N, rows),)](
        *(x, weight, logits, gates, N),
        D=D,
        E=E,
        SOFTMAX=softmax,
        BLOCK_N=rows,
        BLOCK_D=cols if narrow else 32,
        BLOCK_E=block_e,
        num_warps=4,
        num_stages=4,
    )
    return logits, gates


@router_forward.register_fake
def _(x: Tensor, weight: Tensor, softmax: bool) -> tuple[Tensor, Tensor]:
    shape = (len(x), len(weight))
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("pyper::logits_gradient", mutates_args=())
def logits_gradient(dlogits: Tensor, dgates: Tensor, gates: Tensor, softmax: bool) -> Tensor:
    """dlogits plus what dgates asks of the logits, all contiguous (N, E) float32."""
    N, E = gates.shape
    out, rows = torch.empty_like(gates), 128
    _logits_gradient[(triton.cdiv(N, rows),)](
        *(dlogits, dgates, gates, out, N),
        E=E,
        SOFTMAX=softmax,
        BLOCK_N=rows,
        BLOCK_E=block_of(E, 1024),
        num_warps=4,
    )
    return out


@logits_gradient.register_fake
def _(dlogits: Tensor, dgates: Tensor, gates: Tensor, softmax: bool) -> Tensor:
    return torch.empty_like(gates)


@torch.library.custom_op("pyper::router_input_gradient", mutates_args=())
def router_input_gradient(dlogits: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """dlogits · weight, (N, D) in `dtype`, of contiguous dlogits (N, E) float32, weight (E, D).

    A product of few columns is all writing: here as narrow as what reads it.
    """
    (N, E), D = dlogits.shape, weight.shape[1]
    out, rows, cols = dlogits.new_empty(N, D, dtype=dtype), 16, block_of(D, 512)
    _router_input_gradient[(triton.cdiv(N, rows), triton.cdiv(D, cols))](
        *(dlogits, weight, out, N), D=D, E=E, BLOCK_N=rows, BLOCK_D=cols, num_warps=8
    )
    return out


@router_input_gradient.register_fake
def _(dlogits: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return dlogits.new_empty(len(dlogits), weight.shape[1], dtype=dtype)


@torch.library.custom_op("pyper::router_weight_gradient", mutates_args=())
def router_weight_gradient(dlogits: Tensor, x: Tensor) -> Tensor:
    """dlogitsᵀ · x, (E, D) float32, of contiguous dlogits (N, E) float32 and x (N, D).

    Tokens are cut into parts of fixed bounds, whose sums are added in one order: deterministic.
    """
    (N, D), E = x.shape, dlogits.shape[1]
    narrow = x.dtype == torch.bfloat16
    rows, cols = (64, 128) if narrow else (32, 64)
    blocks = triton.cdiv(D, cols)
    steps = block_of(triton.cdiv(N * blocks, 512 * rows), 1 << 20)
    parts = triton.cdiv(N, steps * rows)
    out = x.new_empty(parts, E, D, dtype=torch.float32)
    _router_weight_gradient[(blocks, parts)](
        *(dlogits, x, out, N),
        D=D,
        E=E,
        STEPS=steps,
        BLOCK_N=rows,
        BLOCK_D=cols,
        BLOCK_E=max(block_of(E, 1024), 16),
        num_warps=4,
        num_stages=3,
    )
    return out.sum(dim=0)


@router_weight_gradient.register_fake
def _(dlogits: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(dlogits.shape[1], x.shape[1], dtype=torch.float32)


if launch.HAS_TRITON:

    @triton.jit
    def _thirds(value):
        """Three bf16 numbers whose sum is the float32 value."""
        high = value.to(tl.bfloat16)
        rest = value - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)

    @triton.jit
    def _router_forward(
        x_ptr,
        weight_ptr,
        logits_ptr,
        gates_ptr,
        N,
        D: tl.constexpr,
        E: tl.constexpr,
        SOFTMAX: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_E: tl.constexpr,
    ):
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        e = tl.arange(0, BLOCK_E)
        x_rows = x_ptr + n.to(tl.int64)[:, None] * D
        logits = tl.zeros((BLOCK_N, BLOCK_E), dtype=tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            inside = (n < N)[:, None] & (d < D)[None, :]
            x = tl.load(x_rows + d[None, :], mask=inside, other=0.0)
            known = (e < E)[None, :] & (d < D)[:, None]
            w = tl.load(weight_ptr + e[None, :] * D + d[:, None], mask=known, other=0.0)
            w = w.to(tl.float32)
            if x.dtype == tl.bfloat16:
                # Tensor cores cut sums off instead of rounding: few go into each, many are added.
                high, middle, low = _thirds(w)
                part = tl.dot(x, low)
                part = tl.dot(x, middle, part)
                logits += tl.dot(x, high, part)
            else:
                logits = tl.dot(x, w, logits, input_precision="ieee")
        logits = tl.where((e < E)[None, :], logits, float("-inf"))
        if SOFTMAX:
            gates = tl.exp(logits - tl.max(logits, axis=1)[:, None])
            gates = gates / tl.sum(gates, axis=1)[:, None]
        else:
            gates = 1.0 / (1.0 + tl.exp(-logits))
        at = n.to(tl.int64)[:, None] * E + e[None, :]
        inside = (n < N)[:, None] & (e < E)[None, :]
        tl.store(logits_ptr + at, logits, mask=inside)
        tl.store(gates_ptr + at, gates, mask=inside)

    @triton.jit
    def _logits_gradient(
        dlogits_ptr,
        dgates_ptr,
        gates_ptr,
        out_ptr,
        N,
        E: tl.constexpr,
        SOFTMAX: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_E: tl.constexpr,
    ):
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        e = tl.arange(0, BLOCK_E)
        at = n.to(tl.int64)[:, None] * E + e[None, :]
        inside = (n < N)[:, None] & (e < E)[None, :]
        dgates = tl.load(dgates_ptr + at, mask=inside, other=0.0)
        gates = tl.load(gates_ptr + at, mask=inside, other=0.0)
        if SOFTMAX:
            through = gates * (dgates - tl.sum(gates * dgates, axis=1)[:, None])
        else:
            through = gates * (1.0 - gates) * dgates
        dlogits = tl.load(dlogits_ptr + at, mask=inside, other=0.0)
        tl.store(out_ptr + at, dlogits + through, mask=inside)

    @triton.jit
    def _router_input_gradient(
        dlogits_ptr,
        weight_ptr,
        out_ptr,
        N,
        D: tl.constexpr,
        E: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
        for e in range(E):
            dlogits = tl.load(dlogits_ptr + n * E + e, mask=n < N, other=0.0)
            w = tl.load(weight_ptr + e * D + d, mask=d < D, other=0.0).to(tl.float32)
            total += dlogits[:, None] * w[None, :]
        inside = (n < N)[:, None] & (d < D)[None, :]
        tl.store(out_ptr + n[:, None] * D + d[None, :], total, mask=inside)

    @triton.jit
    def _router_weight_gradient(
        dlogits_ptr,
        x_ptr,
        out_ptr,
        N,
        D: tl.constexpr,
        E: tl.constexpr,
        STEPS: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_E: tl.constexpr,
    ):
        d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
        e = tl.arange(0, BLOCK_E)
        first = tl.program_id(1) * (STEPS * BLOCK_N)
        total = tl.zeros((BLOCK_E, BLOCK_D), dtype=tl.float32)
        for step in range(STEPS):
            n = (first + step * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
            known = (e < E)[:, None] & (n < N)[None, :]
            dlogits = tl.load(dlogits_ptr + n[None, :] * E + e[:, None], mask=known, other=0.0)
            inside = (n < N)[:, None] & (d < D)[None, :]
            x = tl.load(x_ptr + n[:, None] * D + d[None, :], mask=inside, other=0.0)
            if x.dtype == tl.bfloat16:
                high, middle, low = _thirds(dlogits)
                part = tl.dot(low, x)
                part = tl.dot(middle, x, part)
                total += tl.dot(high, x, part)
            else:
                total = tl.dot(dlogits, x, total, input_precision="ieee")
        at = tl.program_id(1).to(tl.int64) * E * D + e[:, None] * D + d[None, :]
        tl.store(out_ptr + at, total, mask=(e < E)[:, None] & (d < D)[None, :])
