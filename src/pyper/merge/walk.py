"""What the routers of a model read, layer after layer."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from pyper.errors import ConfigError, DataError
from pyper.nn import Transformer
from pyper.nn.soft_attention import SoftAttention
from pyper.nn.sparse_feed_forward import SparseFeedForward

Routed = SparseFeedForward | SoftAttention
Visit = Callable[[str, Routed, Tensor], None]
"""Called with a layer's name, the layer and its inputs (N, D), before it computes."""


def routed_layers(model: Transformer) -> dict[str, Routed]:
    """Every layer with a router, by name, in the order of the forward pass.

    Raises ConfigError for a model that has none.
    """
    found = {n: m for n, m in model.named_modules() if isinstance(m, Routed)}
    if model.config.kind != "sparse" or not found:
        raise ConfigError(
            f'a model of `kind = "{model.config.kind}"` has no routers to fit',
            hint="merge dense experts first",
        )
    return found


@torch.no_grad()
def visit_routers(model: Transformer, samples: Sequence[Tensor], visit: Visit) -> None:
    """Run the samples (n, T) through the model once, all together, stopping at every router.

    What `visit` changes in a layer takes effect on this very pass: later layers read what the
    layers before them do then. The model evaluates meanwhile, so no routing state is observed.
    64 k tokens of a 1.5 B model take about 10 GB in float32. Raises DataError where the samples
    have different lengths.
    """
    tokens = _pool(samples).to(model.device)
    was_training = model.training
    with ExitStack() as stack:
        for name, layer in routed_layers(model).items():
            hook = layer.register_forward_pre_hook(_stop(name, visit))
            stack.callback(hook.remove)
        stack.callback(model.train, was_training)
        model.eval()
        model.hidden(tokens)


def _stop(name: str, visit: Visit) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(layer, Routed)
        visit(name, layer, rearrange(inputs[0], "b t d -> (b t) d"))

    return hook


def expert_of_token(samples: Sequence[Tensor]) -> Tensor:
    """(N,) int64: which of the samples each token of the pool comes from."""
    sizes = torch.tensor([sample.numel() for sample in samples])
    return torch.arange(len(samples)).repeat_interleave(sizes)


def _pool(samples: Sequence[Tensor]) -> Tensor:
    lengths = {tuple(sample.shape[1:]) for sample in samples}
    if len(lengths) != 1 or any(s.ndim != 2 or not s.numel() for s in samples):
        shapes = ", ".join(str(tuple(sample.shape)) for sample in samples)
        raise DataError(
            f"samples must be token tensors (n, T) of one length T, not {shapes or 'none at all'}",
            hint="cut them to the same length",
        )
    return torch.cat(list(samples))


def check_one_sample_per_expert(samples: Sequence[Tensor], n_experts: int) -> None:
    """Raises DataError."""
    if len(samples) != n_experts:
        raise DataError(
            f"{n_experts} experts need as many samples, one of each expert's domain, "
            f"not {len(samples)}",
            hint="pass them in the order in which the experts were merged",
        )
