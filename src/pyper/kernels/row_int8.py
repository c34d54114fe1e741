"""`thin_linear` of a single row with int8 weights that nobody widens: the row becomes integers.

512 numbers at a time become integers of 16 bits and one step, a power of two: x = step · q. A bf16
has eight bits of precision, so a number is kept exactly if it is no less than 1/128 of the largest
of the 512; a smaller one is off by at most 2⁻¹⁵ of the largest. Two instructions (dp2a) then
multiply and add four weights; to widen them first takes sixteen. The sum of 512 products fits 32
bits, whatever they are, so it is exact, and a warp adds up its integers in one instruction.

A thread holds the sixteen weights of a row that its sixteen numbers meet: nothing is exchanged
before the sums.
"""

from pyper.kernels import launch

if launch.HAS_TRITON:
    import triton
    import triton.language as tl

    from pyper.kernels.overlap import wait_for_others
    from pyper.kernels.row_epilogue import load_words, store_finished

    @triton.jit
    def _eight(x_ptr, gain_ptr, at, squares, D, HAS_NORM: tl.constexpr):
        """Eight numbers per thread, (T, 8), widened, times their gain; and their squares (T,)."""
        x = tl.load(x_ptr + at, mask=at < D, other=0.0, cache_modifier=".cg").to(tl.float32)
        if HAS_NORM:
            squares += tl.sum(x * x, axis=1)
            gain = tl.load(gain_ptr + at, mask=at < D, other=0.0).to(tl.float32)
            # Rounded as where several rows are multiplied: one text or two, one result.
            x = (x * gain).to(x_ptr.dtype.element_ty).to(tl.float32)
        return x, squares

    @triton.jit
    def _bits(x):
        return x.to(tl.int32, bitcast=True)

    @triton.jit
    def _larger(a, b):
        return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)

    @triton.jit
    def _exponents(x, more):
        """The highest of x and more (T, 8) in each warp's part, as bits of a float32: (T/32,).

        All of its bits are set if there is what is infinite or no number.
        """
        T: tl.constexpr = x.shape[0]
        LANES: tl.constexpr = 32 if T > 32 else T
        largest = _larger(tl.reduce(tl.abs(x), 1, _larger), tl.reduce(tl.abs(more), 1, _larger))
        return tl.max(tl.reshape(_bits(largest), (T // LANES, LANES)), axis=1) & 0x7F800000

    @triton.jit
    def _to_lanes(x, T: tl.constexpr):
        """x (T/32,) for each of T threads."""
        LANES: tl.constexpr = T // x.shape[0]
        return tl.reshape(tl.broadcast_to(x[:, None], (x.shape[0], LANES)), (T,))

    @triton.jit
    def _pairs(x, per_step):
        """x (T, 8) as whole numbers of 16 bits, two in each: (T, 4)."""
        # 3·2²² more: the last bits of the sum are those of the whole number, as two's complement.
        q = _bits(x * per_step[:, None] + 12582912.0)
        first, second = tl.split(tl.reshape(q, (x.shape[0], 4, 2)))
        return (first & 0xFFFF) | (second << 16)

    @triton.jit
    def _of_words(pairs, more):
        """Pairs (T, 4) of two eights, as the first and the last pair of each of four words."""
        T: tl.constexpr = pairs.shape[0]
        both = tl.permute(tl.join(pairs, more), (0, 2, 1))
        first, last = tl.split(tl.reshape(both, (T, 4, 2)))
        return first, last

    @triton.jit
    def _whole(x, more):
        """Sixteen numbers as pairs of 16 bits, (T, 4) twice, and steps (T/32,)."""
        # The largest becomes 2¹⁴ … 2¹⁵. Zeros and the very smallest become zeros; what is infinite
        # or no number has an infinite step, so the result is infinite or no number too.
        exponent = tl.maximum(_exponents(x, more), 32 << 23)
        steps = tl.where(exponent == 255 << 23, exponent, exponent - (14 << 23))
        per_step = ((254 << 23) - (exponent - (14 << 23))).to(tl.float32, bitcast=True)
        per_step = _to_lanes(per_step, x.shape[0])
        first, last = _of_words(_pairs(x, per_step), _pairs(more, per_step))
        return first, last, steps.to(tl.float32, bitcast=True)

    @triton.jit
    def _byte(words, PLACE: tl.constexpr):
        return (words << (24 - 8 * PLACE)) >> 24

    @triton.jit
    def _dp2a(words, first, last, HARDWARE: tl.constexpr):
        """Σ over the four int8 of each word times four of 16 bits, in int32."""
        if HARDWARE:
            return tl.inline_asm_elementwise(
                "dp2a.lo.s32.s32 $0, $2, $1, 0; dp2a.hi.s32.s32 $0, $3, $1, $0;",
                "=&r,r,r,r",
                [words, first, last],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            )
        out = _byte(words, 0) * ((first << 16) >> 16) + _byte(words, 1) * (first >> 16)
        return out + _byte(words, 2) * ((last << 16) >> 16) + _byte(words, 3) * (last >> 16)

    @triton.jit
    def _of_threads(words):
        """Words (BLOCK_N, BLOCK_W), four of each row for a thread: (T, BLOCK_N, 4).

        They are not loaded so: newer versions of Triton spread three axes over threads so that a
        warp meets parts of a row, and sums go through shared memory.
        """
        words = tl.reshape(words, (words.shape[0], words.shape[1] // 4, 4))
        return tl.permute(words, (1, 0, 2))

    @triton.jit
    def _times(words, first, last, steps, HARDWARE: tl.constexpr):
        """Words (T, BLOCK_N, 4) times the row's numbers: float32 (T/32, BLOCK_N)."""
        WARPS: tl.constexpr = steps.shape[0]
        whole = tl.sum(_dp2a(words, first[:, None, :], last[:, None, :], HARDWARE), axis=2)
        whole = tl.reshape(whole, (WARPS, words.shape[0] // WARPS, words.shape[1]))
        whole = tl.sum(whole, axis=1)
        return whole.to(tl.float32) * steps[:, None]

    @triton.jit
    def _row_times_int8(
        x_ptr,
        words_ptr,
        scale_ptr,
        bias_ptr,
        gain_ptr,
        residual_ptr,
        out_ptr,
        eps,
        N: tl.constexpr,
        WORDS: tl.constexpr,
        ACTIVATION: tl.constexpr,
        HAS_NORM: tl.constexpr,
        HAS_SCALE: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_W: tl.constexpr,
        HARDWARE: tl.constexpr,
        EVICTION: tl.constexpr = "",
        EARLY: tl.constexpr = False,
        OVERLAP: tl.constexpr = False,
    ):
        D: tl.constexpr = WORDS * 4
        T: tl.constexpr = BLOCK_W // 4
        GATED: tl.constexpr = ACTIVATION == "swiglu"
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        w = tl.arange(0, BLOCK_W)[None, :]
        d = 16 * tl.arange(0, T)[:, None] + tl.arange(0, 8)[None, :]
        place = tl.arange(0, BLOCK_N)
        if N % BLOCK_N:  # the last row again, instead of one that is not there
            place = tl.minimum(place, N - 1 - tl.program_id(0) * BLOCK_N)
        rows = words_ptr + tl.program_id(0).to(tl.int64) * (BLOCK_N * WORDS)
        rows += place[:, None] * WORDS + w
        gates = load_words(rows, w < WORDS, EVICTION)
        values = gates
        if GATED:
            values = load_words(rows + N * WORDS, w < WORDS, EVICTION)
        wait_for_others(OVERLAP, EARLY)
        WARPS: tl.constexpr = T // 32 if T > 32 else 1
        sums = tl.zeros((WARPS, BLOCK_N), dtype=tl.float32)
        value_sums = tl.zeros((WARPS, BLOCK_N), dtype=tl.float32)
        squares = tl.zeros((T,), dtype=tl.float32)
        for start in tl.static_range(0, WORDS, BLOCK_W):
            at = 4 * start + d
            x, squares = _eight(x_ptr, gain_ptr, at, squares, D, HAS_NORM)
            more, squares = _eight(x_ptr, gain_ptr, at + 8, squares, D, HAS_NORM)
            first, last, steps = _whole(x, more)
            later = start + BLOCK_W
            ahead = later + w < WORDS
            these, gates = gates, load_words(rows + later, ahead, EVICTION)  # on their way
            sums += _times(_of_threads(these), first, last, steps, HARDWARE)
            if GATED:
                these, values = values, load_words(rows + N * WORDS + later, ahead, EVICTION)
                value_sums += _times(_of_threads(these), first, last, steps, HARDWARE)
        total, total_values = tl.sum(sums, axis=0), tl.sum(value_sums, axis=0)
        if HAS_NORM:
            scale = tl.rsqrt(tl.sum(squares, axis=0) / D + eps)
            total *= scale
            total_values *= scale
        store_finished(
            *(total, total_values, n, scale_ptr, bias_ptr, residual_ptr, out_ptr),
            *(N, ACTIVATION, HAS_SCALE, HAS_BIAS, HAS_RESIDUAL),
        )
