"""Linear maps whose products are of 8-bit floats, for training (arXiv:2209.05433)."""

from typing import Any

import torch
from torch import Tensor, nn

_FORWARD, _BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
# The sizes that 8-bit products take are multiples of it.
_MULTIPLE = 16
# A largest value below it is taken for it: scales stay within float32.
_SMALLEST = 2.0**-100


class Fp8Linear(nn.Linear):
    """x·Wᵀ (+ b) in training with 8-bit factors, in evaluation as `nn.Linear`.

    Activations and weights are e4m3, gradients e5m2 (more range, less precision); each tensor has
    one scale, a power of two from its largest value. Sums are in float32 or better, the result in
    the type of x. Sizes that are no multiple of 16 are multiplied as usual.
    """

    @classmethod
    def of(cls, linear: nn.Linear) -> "Fp8Linear":
        """The same map, with the very parameters of `linear`."""
        with torch.device("meta"):
            new = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        new.weight = linear.weight
        if linear.bias is not None:
            new.bias = linear.bias
        return new

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        rows = x.numel() // x.shape[-1]
        fits = all(n % _MULTIPLE == 0 for n in (rows, self.in_features, self.out_features))
        if not (self.training and fits):
            return super().forward(x)
        product: Tensor = _Fp8Product.apply(x.flatten(0, -2), self.weight)  # type: ignore[no-untyped-call]
        out: Tensor = product.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias


def use_fp8(blocks: nn.Module) -> None:
    """Exchange every `nn.Linear` in transformer blocks but the routers, which decide what runs."""
    for module in list(blocks.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name != "router":
                setattr(module, name, Fp8Linear.of(child))


class _Fp8Product(torch.autograd.Function):
    """x (N, in) · weight (out, in)ᵀ; what is kept for the backward pass has 8 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        (x8, x_scale), (w8, w_scale) = _to_fp8(x, _FORWARD), _to_fp8(weight, _FORWARD)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        ctx.dtype = x.dtype
        return _product(x8, w8, x_scale, w_scale, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        grad8, grad_scale = _to_fp8(grad, _BACKWARD)
        to_x = _product(grad8, w8.t().contiguous(), grad_scale, w_scale, ctx.dtype)
        transposed = (grad8.t().contiguous(), x8.t().contiguous())
        to_weight = _product(*transposed, grad_scale, x_scale, ctx.dtype)
        return to_x, to_weight


def _product(
    left: Tensor,
    right: Tensor,
    left_scale: Tensor,
    right_scale: Tensor,
    dtype: torch.dtype,
    fast: bool = False,
) -> Tensor:
    """left (n, k) · right (m, k)ᵀ, both contiguous: the one layout that tensor cores take.

    fast: sums in fewer bits, good enough forwards.
    """
    out: Tensor = torch._scaled_mm(
        left, right.t(), left_scale, right_scale, out_dtype=dtype, use_fast_accum=fast
    )
    return out


def _to_fp8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x / scale in 8 bits, and the scale (), float32: x ≈ x8 · scale.

    Powers of two lose no bits; a not-a-number or infinity in x makes the scale one as well, so that
    it is not hidden.
    """
    largest = x.detach().abs().amax().float()
    ratio = torch.finfo(dtype).max / largest.clamp(min=_SMALLEST)
    exponent = torch.log2(ratio).floor()
    inverse = torch.exp2(exponent)
    x8 = (x.float() * inverse).to(dtype)
    return x8, torch.exp2(-exponent)
