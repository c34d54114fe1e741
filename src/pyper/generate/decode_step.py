"""One token for each of B texts by one dense expert, in shapes that never change.

On a GPU the step is recorded once as a CUDA graph and replayed: a token is then a single launch,
bound by the memory that holds the weights and not by the host. The same function runs unrecorded
on a CPU, where the tests compare it with the general pass.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from pyper.kernels import paged_attention
from pyper.nn import PAGE_TOKENS, KVStore, Transformer
from pyper.nn.attention import Attention
from pyper.nn.block import Block
from pyper.nn.rope import rotation

Part = TypeVar("Part", bound=Callable[..., Any])

# Batches are filled up to one of these.
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Runs before recording: kernels are built and algorithms chosen.
_USUAL_RUNS = 3


def has_fixed_shapes(model: Transformer) -> bool:
    """Whether a step of the model runs the same kernels whatever the tokens are."""
    return model.config.kind == "dense"


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
        pool: Any = None,
    ) -> None:
        """max_tokens: the longest text. pool: memory that graphs which never overlap may share."""
        self.store, self.batch = store, batch
        n_pages = -(-max_tokens // PAGE_TOKENS)
        # Token, position and pages of each row: one copy from the host a step.
        self._inputs = torch.zeros(batch, 2 + n_pages, dtype=torch.long, device=model.device)
        every, c = torch.arange(n_pages * PAGE_TOKENS, device=model.device), model.config
        turns = rotation(every, c.dim_per_head, c.rope_theta, c.rope_scaling)
        self._cos, self._sin = (turn.unsqueeze(-2) for turn in turns)
        self._before = _compiled(before) if compiled else before
        self._after = _compiled(after) if compiled else after
        self._last = _compiled(last) if compiled else last
        self._graph: torch.cuda.CUDAGraph | None = None
        if model.device.type == "cuda":
            self._record(model, pool)

    def run(
        self,
        model: Transformer,
        rows: Sequence[tuple[int, int, list[int]]],
        tokens: Tensor | None = None,
    ) -> Tensor:
        """Log-probabilities (R, V) after one more token in each row (token, position, pages).

        They are overwritten by the next run. model: the one that the step was made for. tokens:
        (R,), instead of those of the rows, where only the device knows them.
        """
        width = self._inputs.shape[1]
        filled = [[token, at, *pages] for token, at, pages in rows]
        padded = [row + [0] * (width - len(row)) for row in filled]
        host = torch.tensor(padded + [[0] * width] * (self.batch - len(rows)))
        self._inputs.copy_(to_device(host, self._inputs.device))
        if tokens is not None:
            self._inputs[: len(rows), 0] = tokens
        if self._graph is None:
            self._out = self._compute(model)
        else:
            self._graph.replay()
        return self._out[: len(rows)]

    def _record(self, model: Transformer, pool: Any) -> None:
        """Rows of zeros write to the page that belongs to nobody."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_USUAL_RUNS):
                self._compute(model)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # Only of this thread: another may be loading an expert.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._out = self._compute(model)

    def _compute(self, model: Transformer) -> Tensor:
        tokens, positions, pages = self._inputs[:, 0], self._inputs[:, 1], self._inputs[:, 2:]
        positions = positions.contiguous()
        x = model.embedding(tokens)
        cos, sin = self._cos[positions], self._sin[positions]
        for layer, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            query, key, value = self._before(block, x, cos, sin)
            keys, values = self.store.keys[layer], self.store.values[layer]
            mixed = paged_attention(query, key, value, keys, values, pages, positions, PAGE_TOKENS)
            x = self._after(block, x, mixed)
        return self._last(model, x)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def before(block: Block, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query (B, H, K), key and value (B, kv_heads, K) of the residual stream x (B, D)."""
    attention = block.attention
    assert isinstance(attention, Attention)
    heads = attention.query_key_value(block.attention_input(x)[None], cos, sin)
    query, key, value = (t[0].transpose(0, 1).contiguous() for t in heads)
    return query, key, value


def after(block: Block, x: Tensor, mixed: Tensor) -> Tensor:
    """The residual stream (B, D) after the block, of what the heads read (B, H, K)."""
    attention = block.attention
    assert isinstance(attention, Attention)
    x = block.add_attention(x, attention.out(mixed.flatten(1)))
    return block.add_feed_forward(x, block.feed_forward(block.feed_forward_input(x)))


def last(model: Transformer, x: Tensor) -> Tensor:
    """log p (B, V) float32 of the residual stream after the last block."""
    out: Tensor = model.head(model.norm(x)).float().log_softmax(dim=-1)
    return out


@cache
def _compiled(part: Part) -> Part:
    """Norms, products and activations in few kernels; all layers and experts share them.

    One compiled function for each part: all steps find each other's kernels there. Coordinate
    descent is what makes products with one row (matrix times vector) reach the speed of
    the memory: only with it does Inductor write them itself.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    options: dict[str, Any] = {"coordinate_descent_tuning": True}
    return cast(Part, torch.compile(part, dynamic=False, options=options))
