"""Blocks that keep their input only, and compute the rest again in the backward pass."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyper.nn.attention import AttentionContext
from pyper.nn.router_state import RouterState
from pyper.nn.sparse_feed_forward import Routed


def run_recomputed(
    block: nn.Module, x: Tensor, context: AttentionContext, layer: int
) -> tuple[Tensor, Routed | None]:
    """`block(x, context, layer)`, with its activations thrown away until they are needed."""
    out: tuple[Tensor, Routed | None] = checkpoint(
        block,
        x,
        context,
        layer,
        use_reentrant=False,
        preserve_rng_state=False,  # there is no dropout
        context_fn=partial(_contexts, block),
    )
    return out


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return nullcontext(), _again(block)


@contextmanager
def _again(block: nn.Module) -> Iterator[None]:
    """Routers have observed this batch already."""
    states = [module for module in block.modules() if isinstance(module, RouterState)]
    for state in states:
        state.is_recomputing = True
    try:
        yield
    finally:
        for state in states:
            state.is_recomputing = False
