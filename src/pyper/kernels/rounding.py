"""float32 weights kept as bf16: exactly, with the low 16 bits beside them, or rounded at random.

A float32 is its upper half, which is a bf16, plus 16 more bits. The upper half is taken rounded to
the nearest (ties away from zero), and what is left of the bits, as a signed number, always fits
int16:  bits of the float32 = (bits of the bf16 << 16) + low.  So a model computes with the bf16
tensor itself, and 2 bytes beside it hold what a float32 master would hold in 4.

Random bits come from a hash of (seed, tensor, step, index): nothing is stored, and a run that was
stopped and resumed rounds as one that was not.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyper.kernels import launch
from pyper.kernels.launch import wide

if launch.HAS_TRITON:
    import triton
    import triton.language as tl

_GOLDEN = 0x9E3779B9
_MASK = 0xFFFFFFFF


def join_weight(weight: Tensor, low: Tensor) -> Tensor:
    """The float32 of a bf16 weight and its low bits (int16, of the same shape)."""
    bits = (weight.view(torch.int16).to(torch.int32) << 16) + low
    return bits.view(torch.float32)


def split_weight(master: Tensor) -> tuple[Tensor, Tensor]:
    """(bf16 weight, int16 low bits) of a float32; `join_weight` gives it back bit for bit.

    Only NaN loses bits: it becomes a quiet NaN of the same sign.
    """
    high = _high_half(master, 0x8000)
    low = master.view(torch.int32) - (high << 16)
    return _as_bf16(high), low.masked_fill_(master.isnan(), 0).to(torch.int16)


def to_masters(weights: Sequence[Tensor], lows: Sequence[Tensor | None]) -> list[Tensor]:
    """`join_weight` of many; where there is no low half, bf16 widened and float32 as it is."""
    masters = [weight.to(wide(weight.dtype)) for weight in weights]
    pairs = [
        (m.view(torch.int32), low) for m, low in zip(masters, lows, strict=True) if low is not None
    ]
    if pairs:
        torch._foreach_add_([bits for bits, _ in pairs], [low for _, low in pairs])
    return masters


def store_masters(
    masters: Sequence[Tensor],
    weights: Sequence[Tensor],
    lows: Sequence[Tensor | None],
    random: Callable[[int], Tensor],
) -> None:
    """Undo `to_masters`; the masters, where they are no weights themselves, are used up.

    random(i): bits that round the i-th, where it has no low half. NaN is stored as any other
    number; those that processors make (0x7FFFFFFF, 0xFFC00000) stay NaN.
    """
    split = [i for i, low in enumerate(lows) if low is not None]
    if split:
        bits = [masters[i].view(torch.int32) for i in split]
        torch._foreach_copy_([low for low in lows if low is not None], bits)  # their lower halves
        torch._foreach_clamp_max_(bits, 0x7FFF7FFF)  # the next would run over
        torch._foreach_add_(bits, 0x8000)
        for b in bits:
            b >>= 16
        torch._foreach_copy_([weights[i].view(torch.int16) for i in split], bits)
    for i, (master, weight, low) in enumerate(zip(masters, weights, lows, strict=True)):
        if low is None and master is not weight:
            weight.copy_(round_stochastically(master, random(i)))


def round_stochastically(master: Tensor, random: Tensor) -> Tensor:
    """bf16 of a float32, up or down with the odds that keep its mean.

    random: int64, of the same shape; its lowest 16 bits decide.
    """
    return _as_bf16(_high_half(master, (random & 0xFFFF).to(torch.int32)))


def random_bits(like: Tensor, key: Tensor) -> Tensor:
    """32 random bits for each element, int64 in the shape of `like`; see `random_key`."""
    index = torch.arange(like.numel(), device=like.device).view(like.shape)
    return _mix(index ^ key)


def more_bits(random: Tensor) -> Tensor:
    """Other bits from `random_bits`, independent of any 16 of them."""
    return _mix(random)


def random_key(seed: int, number: int, step: Tensor) -> Tensor:
    """Key of one tensor's random bits at one step (a tensor without dimensions), int64."""
    start = torch.full((), (seed + _GOLDEN * number) & _MASK, device=step.device)
    return _mix((_mix(start) + step.long()) & _MASK)


def _high_half(master: Tensor, carry: Tensor | int) -> Tensor:
    bits = master.view(torch.int32)
    high = (bits + carry) >> 16
    return torch.where(master.isnan(), (bits >> 16) | 0x40, high)


def _as_bf16(high: Tensor) -> Tensor:
    return high.to(torch.int16).view(torch.bfloat16)


def _mix(x: Tensor) -> Tensor:
    """Every bit of 32 depends on every other (Wellons' `lowbias32`, constants of 2022)."""
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)


if launch.HAS_TRITON:

    @triton.jit
    def join_halves(weight, low):
        """`join_weight`."""
        high = weight.to(tl.int16, bitcast=True).to(tl.int32) << 16
        return (high + low.to(tl.int32)).to(tl.float32, bitcast=True)

    @triton.jit
    def high_half(master, carry):
        """Upper 16 bits of master + carry as int32; of NaN a quiet NaN."""
        bits = master.to(tl.int32, bitcast=True)
        return tl.where(master != master, (bits >> 16) | 0x40, (bits + carry) >> 16)

    @triton.jit
    def low_half(master, high):
        """What `high` leaves of the bits, int16."""
        low = master.to(tl.int32, bitcast=True) - (high << 16)
        return tl.where(master != master, 0, low).to(tl.int16)

    @triton.jit
    def as_bf16(high):
        """The bf16 whose bits are the lower half of an int32."""
        return high.to(tl.int16).to(tl.bfloat16, bitcast=True)

    @triton.jit
    def _mix_bits(x):
        x += 0x9E3779B9
        x = (x ^ (x >> 16)) * 0x21F0AAAD
        x = (x ^ (x >> 15)) * 0x735A2D97
        return x ^ (x >> 15)

    @triton.jit
    def key_of(seed, number, step):
        """`random_key`, uint32."""
        start = seed.to(tl.uint32) + number.to(tl.uint32) * 0x9E3779B9
        return _mix_bits(_mix_bits(start) + step.to(tl.uint32))

    @triton.jit
    def bits_at(index, key):
        """`random_bits`, uint32."""
        return _mix_bits(index.to(tl.uint32) ^ key)

    @triton.jit
    def more_bits_of(random):
        """`more_bits`."""
        return _mix_bits(random)
