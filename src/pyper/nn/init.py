"""Initial weights, drawn from one seed."""

import math

import torch
from torch import nn

from pyper.nn.expert_linear import ExpertLinear
from pyper.nn.transformer import Transformer

# The projections that write to the residual stream.
_OUTPUTS = (".out", ".down")


def init_weights(model: Transformer, seed: int) -> None:
    """Fill a model in place; the same seed gives the same weights on every device.

    `scaled_normal` (GPT-2): N(0, init_std²) everywhere, the two output projections of each block
    divided by √(2·n_layers) so that the residual stream does not grow with depth.
    `zero_output`: N(0, 1/fan_in) for the inner matrices, zeros for the output projections and the
    head, so that every block starts as the identity (as under µP, arXiv:2203.03466).
    Norm gains are 1, biases 0 and routers N(0, init_std²) in both; each expert of a sparse layer
    is drawn like a feed-forward of its own.
    """
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            _fill_normal(module.weight, config.init_std, generator)
        elif isinstance(module, nn.Linear | ExpertLinear):
            if module.weight is not model.embedding.weight:
                _fill_normal(module.weight, _std(model, name, module), generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _std(model: Transformer, name: str, module: nn.Linear | ExpertLinear) -> float:
    config = model.config
    if name.endswith("router"):
        return config.init_std
    is_output = name.endswith(_OUTPUTS)
    if config.init == "zero_output":
        return 0.0 if is_output or name == "head" else 1 / math.sqrt(module.in_features)
    return config.init_std / math.sqrt(2 * config.n_layers) if is_output else config.init_std


@torch.no_grad()
def _fill_normal(weight: torch.Tensor, std: float, generator: torch.Generator) -> None:
    # Drawn on the CPU in float32: CPU and GPU then start from the same numbers.
    values = torch.randn(weight.shape, generator=generator, dtype=torch.float32) * std
    weight.copy_(values)
