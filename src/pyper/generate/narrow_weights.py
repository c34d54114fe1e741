"""Weights in eight bits: decoding is bound by reading them, and reads half."""

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyper.kernels import ThinWeight
from pyper.mixture import Mixture
from pyper.mixture.mixture import ExpertLoader
from pyper.nn import Transformer
from pyper.nn.attention import Attention
from pyper.nn.feed_forward import FeedForward

Narrow = Literal["int8", "fp8"]
# −127 … 127: with −128 the range would not be symmetric, and zero no longer exact.
_LARGEST = {"int8": 127.0, "fp8": torch.finfo(torch.float8_e4m3fn).max}


class NarrowLinear(nn.Module):
    """y = scale · (W x) + b with W in eight bits: one scale per output row (LLM.int8(),
    arXiv:2208.07339, section 2.1), activations as they are."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, narrow: Narrow) -> None:
        super().__init__()
        weight, scale = quantize_rows(linear.weight.detach(), narrow)
        self.register_buffer("weight", weight)
        # In float32: rounded to bf16 a scale would move its whole row.
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        out = (F.linear(x, self.weight.to(x.dtype)) * self.scale).to(x.dtype)
        return out if self.bias is None else out + self.bias


def quantize_rows(weight: Tensor, narrow: Narrow) -> tuple[Tensor, Tensor]:
    """A matrix (out, in) in eight bits, and float32 scales (out,).

    int8 is off by at most half a scale, everywhere alike; fp8 (e4m3) by a sixteenth of the value,
    and so is finer for small values.
    """
    wide = weight.float()
    largest = wide.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny * _LARGEST[narrow])
    scale = largest / _LARGEST[narrow]
    scaled = wide / scale[:, None]
    if narrow == "int8":
        return scaled.round().to(torch.int8), scale
    return scaled.to(torch.float8_e4m3fn), scale


def thin_weight(linear: nn.Module) -> ThinWeight:
    """The matrix of a linear map, wide or narrow, for `thin_linear`."""
    if isinstance(linear, NarrowLinear):
        return ThinWeight(linear.weight, linear.scale, linear.bias)
    assert isinstance(linear, nn.Linear)
    return ThinWeight(linear.weight, None, linear.bias)


@torch.no_grad()
def narrow_model(model: Transformer, narrow: Narrow) -> Transformer:
    """The model with eight-bit attention, feed-forward and head; changed in place.

    Embeddings (and a head that shares them), norms, routers and the experts inside sparse layers
    stay as they are.
    """
    holders = [m for m in model.modules() if isinstance(m, Attention | FeedForward)]
    for holder in holders:
        for name, child in list(holder.named_children()):
            if isinstance(child, nn.Linear):
                setattr(holder, name, NarrowLinear(child, narrow))
    if not model.config.tie_embeddings:
        model.add_module("head", NarrowLinear(model.head, narrow))
    return model


def with_narrow_weights(mixture: Mixture, narrow: Narrow) -> Mixture:
    """The mixture of the same experts, each made eight-bit when it is loaded."""
    return mixture.with_loaders([partial(_load, loader, narrow) for loader in mixture.loaders])


def _load(loader: ExpertLoader, narrow: Narrow) -> Transformer:
    return narrow_model(loader(), narrow)
