"""`thin_linear` of a single row: no products of matrices, only as many loads as can be under way.

Every program multiplies a few rows of the weight with x. Its first loads are sent off before it
waits for x: in decoding, weights stream on while one kernel ends and the next begins.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pyper.kernels import launch
from pyper.kernels.launch import block_of
from pyper.kernels.overlap import overlap_options

if launch.HAS_TRITON:
    import triton
    import triton.language as tl

    from pyper.kernels.overlap import wait_for_others
    from pyper.kernels.row_epilogue import load_words, store_finished
    from pyper.kernels.row_int8 import _row_times_int8


class RowBlocks(NamedTuple):
    """What a program takes."""

    outputs: int
    words: int
    """Of each row of the weight at a time."""
    warps: int
    widened: bool = True
    """Whether weights become float32; else (int8 alone) the row becomes integers."""
    early: bool = False
    """Whether the next kernel is let in before the last one has ended."""
    eviction: str = ""
    """Of weights from the caches: "evict_first" keeps room for what is read again."""


_STORED = {torch.bfloat16: "bf16", torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


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
    """Writes out (1, N); x (1, D), the others as in `thin_linear`, all contiguous.

    Only of weights that `takes` says so.
    """
    N, words = out.shape[1], weight.view(torch.int32)
    as_integers = torch.version.hip is None  # dp2a is NVIDIA's
    blocks = RowBlocks(*_blocks(N, words.shape[1], weight.dtype, as_integers))
    own: dict[str, str | bool]
    kernel, own = _linear_of_row, {"STORED": _STORED[weight.dtype]}
    if not blocks.widened:
        kernel, own = _row_times_int8, {"HARDWARE": x.is_cuda}
    kernel[(triton.cdiv(N, blocks.outputs),)](
        *(x, words, scale, bias, gain, residual, out, eps),
        N=N,
        WORDS=words.shape[1],
        ACTIVATION=activation,
        HAS_NORM=gain is not None,
        HAS_SCALE=scale is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        BLOCK_N=blocks.outputs,
        BLOCK_W=min(blocks.words, max(block_of(words.shape[1], 1 << 20), 4)),
        EVICTION=blocks.eviction,
        EARLY=blocks.early,
        num_warps=blocks.warps,
        **own,
        **overlap_options(overlap, x.device),
    )


def takes(weight: Tensor) -> bool:
    """Whether its rows are whole words of 32 bits."""
    return weight.dtype in _STORED and weight.shape[1] * weight.element_size() % 4 == 0


def _blocks(
    n_outputs: int, row_words: int, stored: torch.dtype, as_integers: bool = True
) -> RowBlocks:
    """as_integers: whether the row of int8 weights becomes integers."""
    if stored == torch.int8 and as_integers:
        # Whole rows, as far as it goes: four words of each of eight rows for a thread.
        words = block_of(row_words, 2048)
        return RowBlocks(8, words, max(words // 128, 1), widened=False)
    if n_outputs <= row_words:  # from here on, what was best on an H200
        return RowBlocks(4, 512, 4)
    if stored != torch.bfloat16:
        return RowBlocks(8, 256, 2)
    if n_outputs <= 2 * row_words:
        return RowBlocks(1, 256, 4)
    return RowBlocks(8, 256, 2) if n_outputs <= 6 * row_words else RowBlocks(4, 512, 2)


if launch.HAS_TRITON:

    @triton.jit
    def _number(words, PLACE: tl.constexpr, STORED: tl.constexpr):
        """The number at a place in words of 32 bits, as float32, by its bits.

        The instruction that widens eight bits runs at a sixteenth of the speed of all others.
        """
        words = words.to(tl.uint32, bitcast=True)
        if STORED == "bf16":
            bits = words << 16 if PLACE == 0 else words & 0xFFFF0000
            return bits.to(tl.float32, bitcast=True)
        if STORED == "int8":  # 2²³ + 128 + n, exactly
            bits = (((words ^ 0x80808080) >> (8 * PLACE)) & 0xFF) | 0x4B000000
            return bits.to(tl.float32, bitcast=True) - 8388736.0
        top = words << (24 - 8 * PLACE)  # float8_e4m3fn: a float32 with its exponent 120 too low
        bits = (top & 0x80000000) | ((top >> 4) & 0x07F00000)
        return bits.to(tl.float32, bitcast=True)

    @triton.jit
    def _with_products(sums, words, x, STORED: tl.constexpr):
        """sums + the numbers of each word (BLOCK_N, BLOCK_W) times theirs of x (BLOCK_D,)."""
        if STORED == "bf16":
            x0, x1 = tl.split(tl.reshape(x, (words.shape[1], 2)))
            sums += _number(words, 0, STORED) * x0[None, :]
            sums += _number(words, 1, STORED) * x1[None, :]
        else:
            even, odd = tl.split(tl.reshape(x, (words.shape[1], 2, 2)))
            x0, x2 = tl.split(even)
            x1, x3 = tl.split(odd)
            sums += _number(words, 0, STORED) * x0[None, :]
            sums += _number(words, 1, STORED) * x1[None, :]
            sums += _number(words, 2, STORED) * x2[None, :]
            sums += _number(words, 3, STORED) * x3[None, :]
        return sums

    @triton.jit
    def _times(words, x, STORED: tl.constexpr):
        """Those products alone: (BLOCK_N, BLOCK_W)."""
        return _with_products(tl.zeros(words.shape, dtype=tl.float32), words, x, STORED)

    @triton.jit
    def _linear_of_row(
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
        STORED: tl.constexpr,
        ACTIVATION: tl.constexpr,
        HAS_NORM: tl.constexpr,
        HAS_SCALE: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_W: tl.constexpr,
        EVICTION: tl.constexpr = "",
        EARLY: tl.constexpr = False,
        OVERLAP: tl.constexpr = False,
    ):
        PER_WORD: tl.constexpr = 2 if STORED == "bf16" else 4
        D: tl.constexpr = WORDS * PER_WORD
        BLOCK_D: tl.constexpr = BLOCK_W * PER_WORD
        GATED: tl.constexpr = ACTIVATION == "swiglu"
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        d, w = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_W)
        rows = words_ptr + n.to(tl.int64)[:, None] * WORDS + w[None, :]
        inside = (n < N)[:, None] & (w < WORDS)[None, :]
        gates = load_words(rows, inside, EVICTION)
        values = gates
        if GATED:
            values = load_words(rows + N * WORDS, inside, EVICTION)
        wait_for_others(OVERLAP, EARLY)
        sums = tl.zeros((BLOCK_N, BLOCK_W), dtype=tl.float32)
        value_sums = tl.zeros((BLOCK_N, BLOCK_W), dtype=tl.float32)
        squares = tl.zeros((BLOCK_D,), dtype=tl.float32)
        for start in tl.static_range(0, WORDS, BLOCK_W):
            at = start * PER_WORD + d
            x = tl.load(x_ptr + at, mask=at < D, other=0.0).to(tl.float32)
            if HAS_NORM:
                squares += x * x
                gain = tl.load(gain_ptr + at, mask=at < D, other=0.0).to(tl.float32)
                # Rounded as where several rows are multiplied: one text or two, one result.
                x = (x * gain).to(x_ptr.dtype.element_ty).to(tl.float32)
            if STORED == "fp8":
                x *= 2.0**60  # half of what its weights lack; the other half comes at the end
            later = start + BLOCK_W
            more = (n < N)[:, None] & (later + w < WORDS)[None, :]
            these, gates = gates, load_words(rows + later, more, EVICTION)  # on their way
            sums = _with_products(sums, these, x, STORED)
            if GATED:
                these, values = values, load_words(rows + N * WORDS + later, more, EVICTION)
                value_sums = _with_products(value_sums, these, x, STORED)
        total, total_values = tl.sum(sums, axis=1), tl.sum(value_sums, axis=1)
        if STORED == "fp8":
            total *= 2.0**60
            total_values *= 2.0**60
        if HAS_NORM:
            scale = tl.rsqrt(tl.sum(squares, axis=0) / D + eps)
            total *= scale
            total_values *= scale
        store_finished(
            *(total, total_values, n, scale_ptr, bias_ptr, residual_ptr, out_ptr),
            *(N, ACTIVATION, HAS_SCALE, HAS_BIAS, HAS_RESIDUAL),
        )
