"""`thin_linear` of a single row: no products of matrices, only as many loads as can be under way.

Every program multiplies a few rows of the weight with x. Its first loads are sent off before it
waits for x: in decoding, weights stream on while one kernel ends and the next begins.
"""

from torch import Tensor

from pyper.kernels import launch
from pyper.kernels.launch import block_of
from pyper.kernels.overlap import overlap_options

if launch.HAS_TRITON:
    import triton
    import triton.language as tl

    from pyper.kernels.activation import _value_and_slope
    from pyper.kernels.overlap import wait_for_others


def linear_of_row(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    eps: float,
    activation: str,
    residual: Tensor | None,
    out: Tensor,
    overlap: bool,
) -> None:
    """Writes out (1, N); x (1, D), the others as in `thin_linear`, all contiguous."""
    N, D = out.shape[1], x.shape[1]
    block_n, block_d, warps = _blocks(N, D)
    block_d = min(block_d, block_of(D, 1 << 20))
    _linear_of_row[(triton.cdiv(N, block_n),)](
        *(x, weight, scale, bias, gain, residual, out, eps),
        N=N,
        D=D,
        ACTIVATION=activation,
        HAS_NORM=gain is not None,
        HAS_SCALE=scale is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        num_warps=warps,
        **overlap_options(overlap, x.device),
    )


def _blocks(n_outputs: int, width: int) -> tuple[int, int, int]:
    """Rows and columns of the weight, and warps, of a program."""
    return (2 if n_outputs <= 4096 else 4), 2048, 4


if launch.HAS_TRITON:

    @triton.jit
    def _scaled(sums, n, scale_ptr, bias_ptr, N_ROWS, HAS_SCALE, HAS_BIAS):
        if HAS_SCALE:
            sums *= tl.load(scale_ptr + n, mask=n < N_ROWS, other=0.0).to(tl.float32)
        if HAS_BIAS:
            sums += tl.load(bias_ptr + n, mask=n < N_ROWS, other=0.0).to(tl.float32)
        return sums

    @triton.jit
    def _linear_of_row(
        x_ptr,
        weight_ptr,
        scale_ptr,
        bias_ptr,
        gain_ptr,
        residual_ptr,
        out_ptr,
        eps,
        N: tl.constexpr,
        D: tl.constexpr,
        ACTIVATION: tl.constexpr,
        HAS_NORM: tl.constexpr,
        HAS_SCALE: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_D: tl.constexpr,
        OVERLAP: tl.constexpr = False,
    ):
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        d = tl.arange(0, BLOCK_D)
        GATED: tl.constexpr = ACTIVATION == "swiglu"
        N_ROWS: tl.constexpr = 2 * N if GATED else N
        rows = weight_ptr + n.to(tl.int64)[:, None] * D + d[None, :]
        inside = (n < N)[:, None] & (d < D)[None, :]
        w = tl.load(rows, mask=inside, other=0.0)
        v = w
        if GATED:
            v = tl.load(rows + N * D, mask=inside, other=0.0)
        wait_for_others(OVERLAP)
        sums = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
        values = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
        squares = tl.zeros((BLOCK_D,), dtype=tl.float32)
        for start in tl.static_range(0, D, BLOCK_D):
            x = tl.load(x_ptr + start + d, mask=start + d < D, other=0.0).to(tl.float32)
            if HAS_NORM:
                squares += x * x
                gain = tl.load(gain_ptr + start + d, mask=start + d < D, other=0.0)
                # Rounded as where several rows are multiplied: one text or two, one result.
                x = (x * gain.to(tl.float32)).to(x_ptr.dtype.element_ty).to(tl.float32)
            later = start + BLOCK_D
            more = (n < N)[:, None] & (later + d < D)[None, :]
            this, w = w, tl.load(rows + later, mask=more, other=0.0)  # on their way meanwhile
            sums += this.to(tl.float32) * x[None, :]
            if GATED:
                this, v = v, tl.load(rows + N * D + later, mask=more, other=0.0)
                values += this.to(tl.float32) * x[None, :]
        total, total_values = tl.sum(sums, axis=1), tl.sum(values, axis=1)
        if HAS_NORM:
            scale = tl.rsqrt(tl.sum(squares, axis=0) / D + eps)
            total *= scale
            total_values *= scale
        total = _scaled(total, n, scale_ptr, bias_ptr, N_ROWS, HAS_SCALE, HAS_BIAS)
        if ACTIVATION != "":
            total, _ = _value_and_slope(total, ACTIVATION)
        if GATED:
            total *= _scaled(total_values, N + n, scale_ptr, bias_ptr, N_ROWS, HAS_SCALE, HAS_BIAS)
        if HAS_RESIDUAL:
            # As two operations would: the product is rounded before it is added.
            total = total.to(out_ptr.dtype.element_ty).to(tl.float32)
            total += tl.load(residual_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(out_ptr + n, total, mask=n < N)
