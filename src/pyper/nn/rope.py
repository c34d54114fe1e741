"""Rotary position embeddings, half-split layout (RoFormer, arXiv:2104.09864, eq. 34)."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from pyper.config import RopeScaling
from pyper.kernels.rotary import turned_torch


@lru_cache(maxsize=64)
def inverse_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device
) -> Tensor:
    """Radians per position of each pair, (K/2,) float32; the scaling is already applied.

    In float32 and in the order in which `transformers` computes them: models were trained with
    those numbers, and a last bit more or less shows in the logits of late positions.
    """
    if scaling is not None and scaling.kind == "ntk":
        theta = theta * scaling.factor ** (head_dim / (head_dim - 2))
    wavelength = theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    frequencies = 1.0 / wavelength
    if scaling is None or scaling.kind == "ntk":
        pass
    elif scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling.kind == "yarn":
        kept = 1 - _yarn_share(theta, head_dim, scaling)
        frequencies = 1.0 / (scaling.factor * wavelength) * (1 - kept) + frequencies * kept
    else:
        frequencies = _llama3(frequencies, scaling)
    return frequencies.to(device)


def _yarn_share(theta: float, head_dim: int, scaling: RopeScaling) -> Tensor:
    """How far each pair (K/2,) is interpolated: fast ones not, slow ones wholly, those between
    in part (arXiv:2309.00071, eq. 19–22)."""

    def pair_with(rotations: float) -> float:
        wavelength = scaling.original_seq_len / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    low, high = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 1e-3
    return ((torch.arange(head_dim // 2).float() - low) / width).clamp(0, 1)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Interpolate pairs by their turns in the original length (Llama 3.1, arXiv:2407.21783)."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_seq_len / (2 * math.pi / frequencies)
    kept = (turns - low) / (high - low)
    between = (1 - kept) * frequencies / scaling.factor + kept * frequencies
    slow = torch.where(turns < low, frequencies / scaling.factor, between)
    return torch.where(turns > high, frequencies, slow)


def attention_scale(scaling: RopeScaling | None) -> float:
    """Factor on cos and sin: YaRN's 0.1·ln s + 1 or what its keys say, otherwise 1."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    stretch = 0.1 * math.log(scaling.factor)
    if scaling.mscale is None or scaling.mscale_all_dim is None:
        return stretch + 1.0
    return (scaling.mscale * stretch + 1.0) / (scaling.mscale_all_dim * stretch + 1.0)


def rotation(
    positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[Tensor, Tensor]:
    """cos and signed sin (..., K), float32, of integer positions (...), for `apply_rotation`.

    Both halves of a head turn by the same angles; the sine of the first half is negative.
    """
    frequencies = inverse_frequencies(head_dim, theta, scaling, positions.device)
    # float32: in bfloat16 the angles of position 1000 are off by whole turns
    angles = positions.float().unsqueeze(-1) * frequencies
    scale = attention_scale(scaling)
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i+K/2}) of x (B, T, H, K) by the angles of its position.

    cos, sin: (T, 1, K), or (B, T, 1, K) where positions differ by row.
    """
    return turned_torch(x, cos, sin)
