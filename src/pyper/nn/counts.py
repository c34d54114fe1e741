"""Parameters and floating-point operations, from the configuration alone."""

import torch

from pyper.config import ExpertConfig
from pyper.nn.expert_stack import ExpertStack
from pyper.nn.feed_forward import FeedForward
from pyper.nn.transformer import Transformer


def count_parameters(config: ExpertConfig) -> int:
    """Number of weights of one expert; nothing is allocated."""
    with torch.device("meta"):
        model = Transformer(config)
    return sum(p.numel() for p in model.parameters())


def flops_per_token(config: ExpertConfig, seq_len: int) -> int:
    """Forward operations per token at a context of `seq_len`: 2·N + 4·L·T·(H·K).

    N leaves the input table out (a look-up) and the experts of sparse layers that a token does not
    meet, and attention counts the whole square as is customary (PaLM, arXiv:2204.02311,
    appendix B), though causal kernels skip half of it.
    """
    lookup = 0 if config.tie_embeddings else config.vocab_size * config.d_model
    matrices = count_parameters(config) - lookup - _idle_parameters(config)
    width = config.n_heads * config.dim_per_head
    n_attentions = config.n_layers * max(config.attention_experts, 1)
    return 2 * matrices + 4 * n_attentions * seq_len * width


def _idle_parameters(config: ExpertConfig) -> int:
    """Weights of the experts that a token does not meet, on average."""
    sparse = config.routing
    n_sparse = sum(map(config.has_sparse_feed_forward, range(config.n_layers)))
    with torch.device("meta"):
        if config.kind == "token_mixture":
            layers = sum(p.numel() for p in ExpertStack(config).layers.parameters())
            one, n_sparse = layers // sparse.n_experts, 1
        else:
            one = sum(p.numel() for p in FeedForward(config).parameters())
    return round(n_sparse * one * (sparse.n_experts - sparse.experts_per_token))


def train_flops_per_token(config: ExpertConfig, seq_len: int) -> int:
    """Forward and backward: three times the forward pass (6·N + 12·L·T·(H·K))."""
    return 3 * flops_per_token(config, seq_len)
