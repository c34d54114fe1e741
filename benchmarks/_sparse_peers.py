"""The sparse layer as others write it: plain torch, and token choice on grouped products."""

import torch
import torch.nn.functional as F
from torch import Tensor

QUOTED = {
    1.0: {
        "MegaBlocks": 11.1,
        "SonicMoE": 11.4,
        "transformers grouped_mm": 11.6,
        "ScatterMoE": 15.6,
    },
    2.0: {
        "MegaBlocks": 22.6,
        "SonicMoE": 22.6,
        "transformers grouped_mm": 25.0,
        "ScatterMoE": 27.8,
    },
}
"""Milliseconds by capacity factor, measured earlier on one H200 (torch 2.11, Triton 3.6) at 32,768
tokens, d_model 2048, d_ff 8192, 8 experts, where bare products took 9.78 and 19.3."""


def bare_products(rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Of rows (E, C, D), and nothing else."""
    return torch.bmm(torch.bmm(rows, up.mT), down.mT)


def with_gelu(rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return torch.bmm(F.gelu(torch.bmm(rows, up.mT)), down.mT)


def plain_expert_choice(
    x: Tensor, router_weight: Tensor, up: Tensor, down: Tensor, capacity: int
) -> Tensor:
    """Expert choice as one writes it in torch."""
    gates = F.linear(x.float(), router_weight.float()).softmax(dim=-1)
    weight, index = gates.T.topk(capacity, dim=-1)
    y = with_gelu(x[index], up, down)
    y = (y * weight.unsqueeze(-1).to(y.dtype)).flatten(0, 1)
    return torch.zeros_like(x).index_add(0, index.flatten(), y)


def grouped_token_choice(
    x: Tensor, router_weight: Tensor, up: Tensor, down: Tensor, top_k: int
) -> Tensor:
    """Token choice: each token takes its `top_k` experts, whose products differ in size."""
    gates = F.linear(x.float(), router_weight.float()).softmax(dim=-1)
    weight, experts = gates.topk(top_k, dim=-1)
    order = experts.flatten().argsort(stable=True)
    token = order // top_k
    counts = (experts.reshape(-1, 1) == torch.arange(len(up), device=x.device)).sum(dim=0)
    ends = counts.cumsum(0).to(torch.int32)
    hidden = F.gelu(F.grouped_mm(x[token], up.mT, offs=ends))
    y = F.grouped_mm(hidden, down.mT, offs=ends)
    y = y * weight.flatten()[order].unsqueeze(-1).to(y.dtype)
    return torch.zeros_like(x).index_add(0, token, y)
