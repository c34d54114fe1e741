"""Linear maps whose products are of 8-bit floats, for training (arXiv:2209.05433)."""

import torch
from torch import Tensor, nn

from pyper.kernels.fp8_products import MULTIPLE, fp8_linear


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
        if not self.takes(x):
            return super().forward(x)
        out = fp8_linear(x.flatten(0, -2), self.weight).view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def takes(self, x: Tensor) -> bool:
        """Whether the product with x (..., in) is of 8-bit floats."""
        sizes = (x.numel() // x.shape[-1], self.in_features, self.out_features)
        return self.training and all(size % MULTIPLE == 0 for size in sizes)


def use_fp8(blocks: nn.Module) -> None:
    """Exchange every `nn.Linear` in transformer blocks but the routers, which decide what runs."""
    for module in list(blocks.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name != "router":
                setattr(module, name, Fp8Linear.of(child))
