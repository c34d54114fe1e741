"""The residual stream and its norm: one pass forward, one backward.

The stream branches where it is normalised, so its gradient is a sum of two. One kernel reads both,
writes the sum, and adds up the gain's gradient on the way: no row of D numbers is read twice.
"""

from typing import Any

import torch
from torch import Tensor

from pyper.kernels import launch
from pyper.kernels.launch import block_of, wide

if launch.HAS_TRITON:
    import triton
    import triton.language as tl

# So many partial sums of the gain's gradient, whatever the GPU: results are to be the same.
_PARTS = 512
# A row is held in registers, and the next two in shared memory where they fit.
LARGEST_DIM = 8192
_LARGEST_AHEAD = 16_384  # bytes


def add_norm(x: Tensor, out: Tensor | None, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y = x + out (x itself without), and gain · y / √(mean(y²) + eps); both (..., D).

    y is rounded to the type of x before it is normalised; x and out have one shape and type. Gains
    (D,), or (E, D) of as many rows each: x is then (E, …, D).
    """
    if not launch.runs_triton(x) or x.shape[-1] > LARGEST_DIM:
        return add_norm_torch(x, out, gain, eps)
    y, normed = _AddNorm.apply(x, out, gain, eps)
    return y, normed


def norm_alone(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """What `add_norm` says second of x (..., D), of which nobody else needs the first."""
    if not launch.runs_triton(x) or x.shape[-1] > LARGEST_DIM:
        return add_norm_torch(x, None, gain, eps)[1]
    out: Tensor = _Norm.apply(x, gain, eps)
    return out


def add_norm_torch(
    x: Tensor, out: Tensor | None, gain: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The twin of `add_norm`, in plain torch."""
    y = x if out is None else x + out
    rows = y.to(wide(y.dtype))
    scale = (rows.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    own = gain if gain.ndim == 1 else gain.view(len(gain), *(1,) * (x.ndim - 2), -1)
    return y, (rows * scale * own).to(y.dtype)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, out: Tensor | None, gain: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1])
        others = None if out is None else out.reshape(rows.shape)
        y, normed, scale = add_norm_forward(rows, others, gain, eps)
        y = rows if out is None else y
        ctx.save_for_backward(y, scale, gain)
        return y.view(x.shape), normed.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dnormed: Tensor) -> tuple[Tensor | None, ...]:
        y, scale, gain = ctx.saved_tensors
        dx, parts = add_norm_gradient(
            dnormed.reshape(y.shape).contiguous(), dy.reshape(y.shape).contiguous(), y, scale, gain
        )
        dx = dx.view(dy.shape)
        dgain = _gain_gradient(parts, gain) if ctx.needs_input_grad[2] else None
        return dx, dx if ctx.needs_input_grad[1] else None, dgain, None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        _, normed, scale = add_norm_forward(rows, None, gain, eps)
        ctx.save_for_backward(rows, scale, gain)
        return normed.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dnormed: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, scale, gain = ctx.saved_tensors
        given = dnormed.reshape(rows.shape).contiguous()
        dx, parts = add_norm_gradient(given, None, rows, scale, gain)
        return dx.view(dnormed.shape), _gain_gradient(parts, gain), None


def _gain_gradient(parts: Tensor, gain: Tensor) -> Tensor:
    """Sums of parts (E · P, D) in the shape of the gain."""
    return parts.view(n_gains(gain), -1, gain.shape[-1]).sum(dim=1).view_as(gain).to(gain.dtype)


@torch.library.custom_op("pyper::add_norm_forward", mutates_args=())
def add_norm_forward(
    x: Tensor, out: Tensor | None, gain: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y = x + out (empty without), its norm, and 1 / √(mean(y²) + eps), (N,) float32.

    x, out (N, D).
    """
    x, out = x.contiguous(), None if out is None else out.contiguous()
    y, normed, scale = _forward_of(x, out)
    N, D = x.shape
    block = block_of(D, LARGEST_DIM)
    _add_norm[(N,)](
        *(x, out, gain, y, normed, scale, N // n_gains(gain), eps),
        D=D,
        HAS_OUT=out is not None,
        BLOCK_D=block,
        num_warps=_warps(block),
    )
    return y, normed, scale


@add_norm_forward.register_fake
def _(x: Tensor, out: Tensor | None, gain: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _forward_of(x, out)


@torch.library.custom_op("pyper::add_norm_gradient", mutates_args=())
def add_norm_gradient(
    dnormed: Tensor, dy: Tensor | None, y: Tensor, scale: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of y, its own `dy` included, and parts (E · P, D) float32 of those of the gains.

    dnormed, dy (N, D) contiguous. The P parts of a gain are to be summed.
    """
    dx, parts = _gradient_of(y, gain)
    N, D = y.shape
    block = block_of(D, LARGEST_DIM)
    reads_ahead = block * y.element_size() <= _LARGEST_AHEAD
    E = n_gains(gain)
    _add_norm_gradient[(len(parts) // E, E)](
        *(dnormed, dy, y.contiguous(), scale, gain, dx, parts, N // E),
        PARTS=len(parts) // E,
        STAGES=3 if reads_ahead else 1,
        D=D,
        HAS_DY=dy is not None,
        BLOCK_D=block,
        num_warps=_warps(2 * block),
    )
    return dx, parts


@add_norm_gradient.register_fake
def _(dnormed: Tensor, dy: Tensor, y: Tensor, scale: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    return _gradient_of(y, gain)


def n_gains(gain: Tensor) -> int:
    """E of gains (E, D), or 1."""
    return gain.numel() // gain.shape[-1]


def _forward_of(x: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty(0 if out is None else x.shape)
    return y, x.new_empty(x.shape), x.new_empty(len(x), dtype=torch.float32)


def _gradient_of(y: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    E = n_gains(gain)
    each = min(max(1, _PARTS // E), len(y) // E)
    parts = y.new_empty(E * each, y.shape[1], dtype=torch.float32)
    return y.new_empty(y.shape), parts


def _warps(block: int) -> int:
    """16 numbers for each thread: two loads of 16 bytes in bf16."""
    return max(1, min(16, block // 512))


if launch.HAS_TRITON:

    @triton.jit
    def _add_norm(
        x_ptr,
        out_ptr,
        gain_ptr,
        y_ptr,
        normed_ptr,
        scale_ptr,
        R,
        eps,
        D: tl.constexpr,
        HAS_OUT: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        n = tl.program_id(0)
        d = tl.arange(0, BLOCK_D)
        at = n.to(tl.int64) * D + d
        y = tl.load(x_ptr + at, mask=d < D, other=0.0).to(tl.float32)
        gain = tl.load(gain_ptr + n // R * D + d, mask=d < D, other=0.0).to(tl.float32)
        if HAS_OUT:
            y += tl.load(out_ptr + at, mask=d < D, other=0.0).to(tl.float32)
            rounded = y.to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + at, rounded, mask=d < D)
            y = rounded.to(tl.float32)
        scale = tl.rsqrt(tl.sum(y * y, axis=0) / D + eps)
        tl.store(normed_ptr + at, y * scale * gain, mask=d < D)
        tl.store(scale_ptr + n, scale)

    @triton.jit
    def _add_norm_gradient(
        dnormed_ptr,
        dy_ptr,
        y_ptr,
        scale_ptr,
        gain_ptr,
        dx_ptr,
        parts_ptr,
        R,
        PARTS: tl.constexpr,
        STAGES: tl.constexpr,
        D: tl.constexpr,
        HAS_DY: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        part, expert = tl.program_id(0), tl.program_id(1)
        d = tl.arange(0, BLOCK_D)
        gain = tl.load(gain_ptr + expert * D + d, mask=d < D, other=0.0).to(tl.float32)
        total = tl.zeros((BLOCK_D,), dtype=tl.float32)
        # Rows are on their way while others are added up.
        for row in tl.range(part, R, PARTS, num_stages=STAGES):
            n = tl.cast(expert, tl.int64) * R + row
            at = n * D + d
            y = tl.load(y_ptr + at, mask=d < D, other=0.0).to(tl.float32)
            dnormed = tl.load(dnormed_ptr + at, mask=d < D, other=0.0).to(tl.float32)
            scale = tl.load(scale_ptr + n)
            y *= scale
            total += dnormed * y
            dnormed *= gain
            along = tl.sum(dnormed * y, axis=0) / D
            dx = (dnormed - y * along) * scale
            if HAS_DY:
                dx += tl.load(dy_ptr + at, mask=d < D, other=0.0).to(tl.float32)
            tl.store(dx_ptr + at, dx, mask=d < D)
        at = (expert * PARTS + part).to(tl.int64) * D + d
        tl.store(parts_ptr + at, total, mask=d < D)
