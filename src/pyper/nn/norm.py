"""Root-mean-square normalisation."""

from typing import Any

import torch
from torch import Tensor, nn

from pyper.kernels import add_norm, launch, norm_alone
from pyper.kernels.rms_norm import LARGEST_DIM


class RMSNorm(nn.Module):
    """y = w · x / √(mean(x²) + eps), over the last dimension (arXiv:1910.07467, eq. 4)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., dim); the result has the dtype of x."""
        # Compilers fuse the plain one with what stands around it.
        if self.runs_as_one(x) and not torch.compiler.is_compiling():
            return norm_alone(x, self.weight, self.eps)
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
        """y = x + out (x itself without), and y normalised; all (..., dim)."""
        return add_norm(x, out, self.weight, self.eps)

    def runs_as_one(self, x: Tensor) -> bool:
        """Whether training on x takes kernels, one forward and one backward."""
        return self.training and x.shape[-1] <= LARGEST_DIM and launch.runs_triton(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight · x / √(mean(x²) + eps) of x (..., dim); `weight` broadcasts against x."""
    out: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


class _RMSNorm(torch.autograd.Function):
    """The derivative written out: half the operations, and half the memory, of the composed one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # The mean of squares needs float32; half precision loses small activations.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1]
        scale = (mean_square + eps).rsqrt()
        normed = (wide * scale).to(x.dtype)
        ctx.save_for_backward(normed, scale, weight)
        out: Tensor = normed * weight
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, scale, weight = ctx.saved_tensors
        to_normed = grad * weight
        along = (to_normed * normed).sum(dim=-1, keepdim=True, dtype=scale.dtype) / grad.shape[-1]
        to_x = (to_normed - normed * along.to(normed.dtype)) * scale.to(normed.dtype)
        return to_x, (grad * normed).sum_to_size(weight.shape), None
