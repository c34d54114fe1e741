"""One token for each of B texts by one dense expert, in shapes that never change.

On a GPU the step is recorded once as a CUDA graph and replayed: a token is then a single launch,
bound by the memory that holds the weights and not by the host. The same function runs unrecorded
on a CPU, where the tests compare it with the general pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyper.generate.recording import record
from pyper.generate.step_inputs import Row, StepInputs
from pyper.generate.thin_layers import ThinLayers
from pyper.generate.usual_layers import UsualLayers
from pyper.generate.whole_layers import WholeLayers
from pyper.nn import PAGE_TOKENS, KVStore, Transformer
from pyper.nn.rope import rotation

# Batches are filled up to one of these.
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def has_fixed_shapes(model: Transformer) -> bool:
    """Whether a step of the model runs the same kernels whatever the tokens are."""
    return model.config.kind == "dense"


def layers_for(
    model: Transformer,
    store: KVStore,
    batch: int,
    max_tokens: int,
    *,
    compiled: bool,
    thin: bool | None,
) -> ThinLayers | UsualLayers | WholeLayers:
    """In as few kernels as can be: one for a token, five a layer, or as they are written.

    thin: the layers are kernels for few rows; None: where those run, unless compiled.
    """
    if thin is None:
        thin = not compiled and ThinLayers.pay_for(model, batch)
    if thin and WholeLayers.pay_for(model, batch):
        return WholeLayers(model, store, max_tokens)
    every, c = torch.arange(max_tokens, device=model.device), model.config
    cos, sin = rotation(every, c.dim_per_head, c.rope_theta, c.rope_scaling)
    if thin:
        return ThinLayers(cos, sin, batch * c.kv_heads)
    return UsualLayers(cos, sin, compiled=compiled)


class DecodeStep:
    """Reads one token per row; every replay reads and writes the same memory."""

    def __init__(
        self,
        model: Transformer,
        store: KVStore,
        batch: int,
        max_tokens: int,
        *,
        compiled: bool = False,
        thin: bool | None = None,
        pool: Any = None,
    ) -> None:
        """max_tokens: the longest text. compiled, thin: see `layers_for`.

        pool: see `record`; rows without a text write to the page that belongs to nobody.
        """
        self.store, self.batch = store, batch
        n_pages = -(-max_tokens // PAGE_TOKENS)
        self._inputs = StepInputs(batch, n_pages, model.device)
        longest = n_pages * PAGE_TOKENS
        self._layers = layers_for(model, store, batch, longest, compiled=compiled, thin=thin)
        self._graph: torch.cuda.CUDAGraph | None = None
        if model.device.type == "cuda":
            self._graph, self._out = record(lambda: self._compute(model), pool)

    def run(self, model: Transformer, rows: Sequence[Row], tokens: Tensor | None = None) -> Tensor:
        """Log-probabilities (R, V) after one more token in each row; the next run overwrites them.

        model: the one that the step was made for. tokens: see `StepInputs.fill`.
        """
        self._inputs.fill(rows, tokens)
        if self._graph is None:
            self._out = self._compute(model)
        else:
            self._graph.replay()
        return self._out[: len(rows)]

    def _compute(self, model: Transformer) -> Tensor:
        inputs = self._inputs
        out = self._layers(model, self.store, inputs.tokens, inputs.positions, inputs.pages)
        inputs.advance()
        return out
