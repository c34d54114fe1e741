"""How the kernels of a single row begin and end."""

from pyper.kernels import launch

if launch.HAS_TRITON:
    import triton
    import triton.language as tl

    from pyper.kernels.activation import _value_and_slope

    @triton.jit
    def load_words(words, inside, EVICTION: tl.constexpr):
        return tl.load(words, mask=inside, other=0, eviction_policy=EVICTION)

    @triton.jit
    def _scaled(sums, n, scale_ptr, bias_ptr, N_ROWS, HAS_SCALE, HAS_BIAS):
        if HAS_SCALE:
            sums *= tl.load(scale_ptr + n, mask=n < N_ROWS, other=0.0).to(tl.float32)
        if HAS_BIAS:
            sums += tl.load(bias_ptr + n, mask=n < N_ROWS, other=0.0).to(tl.float32)
        return sums

    @triton.jit
    def store_finished(
        sums,
        values,
        n,
        scale_ptr,
        bias_ptr,
        residual_ptr,
        out_ptr,
        N: tl.constexpr,
        ACTIVATION: tl.constexpr,
        HAS_SCALE: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
    ):
        """Scale, bias, activation and residual of outputs n; values are read for SwiGLU alone."""
        GATED: tl.constexpr = ACTIVATION == "swiglu"
        N_ROWS: tl.constexpr = 2 * N if GATED else N
        total = _scaled(sums, n, scale_ptr, bias_ptr, N_ROWS, HAS_SCALE, HAS_BIAS)
        if ACTIVATION != "":
            total, _ = _value_and_slope(total, ACTIVATION)
        if GATED:
            total *= _scaled(values, N + n, scale_ptr, bias_ptr, N_ROWS, HAS_SCALE, HAS_BIAS)
        if HAS_RESIDUAL:
            # As two operations would: the product is rounded before it is added.
            total = total.to(out_ptr.dtype.element_ty).to(tl.float32)
            residual = tl.load(residual_ptr + n, mask=n < N, other=0.0, cache_modifier=".cg")
            total += residual.to(tl.float32)
        tl.store(out_ptr + n, total, mask=n < N)
