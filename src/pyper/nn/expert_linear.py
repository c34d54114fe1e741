"""E linear maps of one shape."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ExpertLinear(nn.Module):
    """y_e = x_e · W_eᵀ (+ b_e) for each expert e; weight (E, out, in), bias (E, out)."""

    def __init__(self, n_experts: int, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features = in_features
        self.weight = nn.Parameter(torch.empty(n_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(n_experts, out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x (E, C, in) to (E, C, out): as many rows for each expert, in one batched product."""
        if self.bias is None:
            return torch.bmm(x, self.weight.mT)
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight.mT)

    def grouped(self, x: Tensor, expert: Tensor, ends: Tensor) -> Tensor:
        """Rows x (M, in) in order of their experts (M,) to (M, out), in one grouped product.

        ends: (E,) int32, where each expert's rows end. bfloat16 on a GPU only.
        """
        out: Tensor = F.grouped_mm(x, self.weight.mT, offs=ends)
        return out if self.bias is None else out + self.bias[expert]

    def of_expert(self, expert: int, x: Tensor) -> Tensor:
        """x (n, in) to (n, out) through one expert."""
        bias = None if self.bias is None else self.bias[expert]
        return F.linear(x, self.weight[expert], bias)
