"""Attentions side by side, all of which read every token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyper.config import ExpertConfig
from pyper.nn.attention import Attention, AttentionContext


class SoftAttention(nn.Module):
    """Σ_e gate_e · attention_e(x), gates softmax over all experts (BAM, arXiv:2408.08274).

    Each has keys and values of its own, so a token's choice of some would leave gaps in what later
    tokens attend to: all run, and cost `attention_experts` times one.
    """

    def __init__(self, config: ExpertConfig, layer: int) -> None:
        super().__init__()
        n_experts = config.attention_experts
        self.router = nn.Linear(config.d_model, n_experts, bias=False)
        self.experts = nn.ModuleList(Attention(config, layer) for _ in range(n_experts))

    def forward(self, x: Tensor, context: AttentionContext, layer: int) -> Tensor:
        """Attend within x (B, T, D), and to the cached past where there is one."""
        # float32 gates and sum: E gates rounded to bf16 no longer sum to one
        wide = torch.promote_types(x.dtype, torch.float32)
        gates = F.linear(x.to(wide), self.router.weight.to(wide)).softmax(dim=-1)  # (B, T, E)
        out = torch.zeros_like(x, dtype=wide)
        for number, (expert, gate) in enumerate(
            zip(self.experts, gates.split(1, dim=-1), strict=True)
        ):
            slot = layer * len(self.experts) + number  # in the cache
            out = out + gate * expert(x, context, slot)
        return out.to(x.dtype)
