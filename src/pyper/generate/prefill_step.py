"""The beginning of a text by one dense expert, in shapes that never change.

The host takes longer to launch what a prompt of a thousand tokens needs than a GPU takes to do it.
Recorded as a CUDA graph it is one launch. A beginning is filled up to a power of two; what is
filled in comes last, where no token looks, and goes to the page that belongs to nobody.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyper.generate.recording import record
from pyper.generate.transfer import to_device
from pyper.generate.usual_layers import after, before
from pyper.kernels.launch import block_of
from pyper.nn import KVStore, Transformer
from pyper.nn.block import Block
from pyper.nn.causal_attention import causal_attention
from pyper.nn.kv_cache import slots_of
from pyper.nn.rope import rotation

_SHORTEST = 16


def filled_length(n_tokens: int) -> int:
    """Of the step that reads so many tokens."""
    return max(block_of(n_tokens, 1 << 30), _SHORTEST)


class PrefillStep:
    """Reads the first tokens of a text; every replay reads and writes the same memory."""

    def __init__(
        self, model: Transformer, store: KVStore, length: int, *, pool: Any = None
    ) -> None:
        """length: see `filled_length`. pool: see `record`."""
        self.store, self.length = store, length
        # Tokens, and where their keys and values go.
        self._inputs = torch.zeros(2, length, dtype=torch.long, device=model.device)
        c, every = model.config, torch.arange(length, device=model.device)
        cos, sin = rotation(every, c.dim_per_head, c.rope_theta, c.rope_scaling)
        self._cos, self._sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        self._graph: torch.cuda.CUDAGraph | None = None
        if model.device.type == "cuda":
            self._graph, self._states = record(lambda: self._compute(model), pool)

    def run(self, model: Transformer, tokens: Sequence[int], pages: Sequence[int]) -> Tensor:
        """Final states (n, D) of the first n tokens of a text; the next run overwrites them.

        model: the one that the step was made for. pages: of the text, in order.
        """
        fill = [0] * (self.length - len(tokens))
        slots = slots_of(pages, range(len(tokens)))
        rows = torch.tensor([[*tokens, *fill], [*slots, *fill]])
        self._inputs.copy_(to_device(rows, self._inputs.device))
        if self._graph is None:
            self._states = self._compute(model)
        else:
            self._graph.replay()
        return self._states[: len(tokens)]

    def _compute(self, model: Transformer) -> Tensor:
        tokens, slots = self._inputs.unbind()
        x = model.embedding(tokens)
        for layer, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            query, key, value = before(block, x, self._cos, self._sin)
            self.store.keys[layer].index_copy_(0, slots, key)
            self.store.values[layer].index_copy_(0, slots, value)
            mixed = causal_attention(*(t.transpose(0, 1)[None] for t in (query, key, value)))
            x = after(block, x, mixed[0].transpose(0, 1))
        states: Tensor = model.norm(x)
        return states
