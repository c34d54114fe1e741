"""Weights in eight bits: decoding is bound by reading them, and reads half."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyper.mixture import Mixture
from pyper.mixture.mixture import ExpertLoader
from pyper.nn import Transformer
from pyper.nn.attention import Attention
from pyper.nn.feed_forward import FeedForward

# −127 … 127: with −128 the range would not be symmetric, and zero no longer exact.
_LARGEST = 127


class Int8Linear(nn.Module):
    """y = scale · (W x) + b with integer W: one scale per output row (LLM.int8(),
    arXiv:2208.07339, section 2.1), activations as they are."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantize_rows(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.to(linear.weight.dtype))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out). Compiled, the weights are widened inside the product."""
        out = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return out if self.bias is None else out + self.bias


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 (out, in) and float32 scales (out,) of a matrix: off by at most half a scale."""
    wide = weight.float()
    scale = wide.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST
    return (wide / scale[:, None]).round().to(torch.int8), scale


@torch.no_grad()
def to_int8(model: Transformer) -> Transformer:
    """The model with eight-bit attention, feed-forward and head; changed in place.

    Embeddings (and a head that shares them), norms, routers and the experts inside sparse layers
    stay as they are.
    """
    holders = [m for m in model.modules() if isinstance(m, Attention | FeedForward)]
    for holder in holders:
        for name, child in list(holder.named_children()):
            if isinstance(child, nn.Linear):
                setattr(holder, name, Int8Linear(child))
    if not model.config.tie_embeddings:
        model.add_module("head", Int8Linear(model.head))
    return model


def with_int8_weights(mixture: Mixture) -> Mixture:
    """The mixture of the same experts, each made eight-bit when it is loaded."""
    return mixture.with_loaders([partial(_load_int8, loader) for loader in mixture.loaders])


def _load_int8(loader: ExpertLoader) -> Transformer:
    return to_int8(loader())
