"""Moments of an optimizer in 8 bits: a logarithmic code, one scale per 256 numbers.

The bits of a positive float32, read as an integer, are its logarithm but for a straight line inside
each octave. So the distance of a number's bits from those of the largest of its block, in steps of
a twelfth of an octave, is a code that costs an integer division, and has the same relative error
(at most 4.2 %) everywhere down to 2^−10.5 of the largest with a sign, to 2^−21 without: as far as
squares of the former reach. Codes without sign are never 0 beside a number that is not: what is
divided by the root of a second moment stays bounded.

Rounding is random: with a decay of 0.95 or slower a moment moves by less than half a step, and
rounding to the nearest would hold it where it is.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pyper.kernels import launch
from pyper.kernels.launch import wide

if launch.HAS_TRITON:
    import triton
    import triton.language as tl

BLOCK = 256
"""Numbers that share one scale."""
_STEP = 16 * 43_691  # 2^23 / 12: bits of a float32 in a twelfth of an octave
_HALF_STEP = _STEP // 2


@dataclass(frozen=True)
class Moment:
    """A running mean that belongs to a weight: float32, or codes with the largest numbers."""

    values: Tensor
    """In the shape of the weight: float32 (or wider), int8 codes, or uint8 codes without sign."""
    largest: Tensor | None = None
    """(n / 256,) float32, of codes."""

    @classmethod
    def zeros(cls, weight: Tensor, bits: int, signed: bool) -> "Moment":
        """Nothing seen yet; bits 8 or 32."""
        if bits == 32:
            return cls(torch.zeros_like(weight, dtype=wide(weight.dtype)))
        codes = torch.zeros_like(weight, dtype=torch.int8 if signed else torch.uint8)
        n_blocks = -(-weight.numel() // BLOCK)
        return cls(codes, torch.zeros(n_blocks, device=weight.device))

    def read(self) -> Tensor:
        """The numbers themselves, in the shape of the weight."""
        if self.largest is None:
            return self.values
        return decode(self.values.flatten(), self.largest).view(self.values.shape)

    def write(self, numbers: Tensor, random: Tensor | None = None) -> None:
        """Take over numbers in the shape of the weight; see `encode` for `random`."""
        if self.largest is None:
            self.values.copy_(numbers)
            return
        signed = self.values.dtype == torch.int8
        flat = None if random is None else random.flatten()
        codes, largest = encode(numbers.float().flatten(), signed, flat)
        self.values.copy_(codes.view(self.values.shape))
        self.largest.copy_(largest)

    def state_dict(self) -> dict[str, Tensor | None]:
        """Its tensors by name."""
        return {"values": self.values, "largest": self.largest}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        """Take over a moment of this format, bit for bit, or of the other one."""
        values, largest = state["values"], state["largest"]
        assert values is not None
        if self.largest is None or largest is None:
            device = self.values.device
            tensors = (None if t is None else t.to(device) for t in (values, largest))
            self.write(Moment(*tensors).read())  # type: ignore[arg-type]
        else:
            self.values.copy_(values)
            self.largest.copy_(largest)


def encode(x: Tensor, signed: bool, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes (n,) of x (n,) float32, int8 or, unsigned, uint8; largest numbers (n / 256,) float32.

    random (n,) int64: its lowest 16 bits round; without it rounding is to the nearest.
    """
    blocks = _blocks(x)
    largest = blocks.abs().amax(dim=1)
    noise = _HALF_STEP if random is None else ((_blocks(random) & 0xFFFF) * (_STEP >> 4)) >> 12
    below = largest.view(torch.int32)[:, None] - blocks.abs().view(torch.int32)
    level = (below.long() + noise) // _STEP
    if signed:
        code = (127 - level).clamp(min=0) * blocks.sign().long()
        return code.to(torch.int8).flatten()[: len(x)], largest
    return level.clamp(max=255).to(torch.uint8).flatten()[: len(x)], largest


def decode(codes: Tensor, largest: Tensor) -> Tensor:
    """float32 numbers (n,) of codes (n,) and the largest of each block."""
    code = _blocks(codes).to(torch.int32)
    level = 127 - code.abs() if codes.dtype == torch.int8 else code
    bits = (largest.view(torch.int32)[:, None] - level * _STEP).clamp(min=0)
    value = bits.view(torch.float32)
    if codes.dtype == torch.int8:
        value = value * code.sign()
    return value.flatten()[: len(codes)]


def _blocks(x: Tensor) -> Tensor:
    return F.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)


if launch.HAS_TRITON:

    @triton.jit
    def _levels(magnitude, largest, random):
        noise = ((random & 0xFFFF) * 43691) >> 12
        below = largest.to(tl.int32, bitcast=True)[:, None] - magnitude.to(tl.int32, bitcast=True)
        # Without a sign, for which a division would have to look: what is largest is not below.
        return ((below + noise.to(tl.int32)).to(tl.uint32) // 699056).to(tl.int32)

    @triton.jit
    def _magnitude(level, largest):
        bits = largest.to(tl.int32, bitcast=True)[:, None] - level * 699056
        return tl.maximum(bits, 0).to(tl.float32, bitcast=True)

    @triton.jit
    def encode_signed(x, random):
        """`encode` of blocks (R, 256); random uint32."""
        magnitude = tl.abs(x)
        largest = tl.max(magnitude, axis=1)
        code = tl.maximum(127 - _levels(magnitude, largest, random), 0)
        code = tl.where(x == 0, 0, tl.where(x < 0, -code, code))
        return code.to(tl.int8), largest

    @triton.jit
    def decode_signed(code, largest):
        """`decode` of blocks (R, 256)."""
        code = code.to(tl.int32)
        value = _magnitude(127 - tl.abs(code), largest)
        return tl.where(code == 0, 0.0, tl.where(code < 0, -value, value))

    @triton.jit
    def encode_unsigned(x, random):
        """`encode` of blocks (R, 256) that are not negative; random uint32."""
        largest = tl.max(x, axis=1)
        return tl.minimum(_levels(x, largest, random), 255).to(tl.uint8), largest

    @triton.jit
    def decode_unsigned(code, largest):
        """`decode` of blocks (R, 256)."""
        return _magnitude(code.to(tl.int32), largest)
