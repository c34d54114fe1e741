"""All layers for one token of each of a few texts: five kernels a layer, which stream the weights.

What stands between the products (norms, RoPE, activation, residual) is done inside them: alone each
would be a launch and a pause of the memory, which is what a token of few texts waits for. Each
kernel begins while the one before it ends: all they read early was written before the first layer.
"""

import torch
from torch import Tensor

from pyper.config import ExpertConfig
from pyper.generate.narrow_weights import thin_weight
from pyper.kernels import InputNorm, Turn, launch, paged_attention, thin_linear
from pyper.kernels.thin_blocks import MOST_ROWS, SHARED_BYTES, TICKETS
from pyper.kernels.thin_linear import ThinRows, ThinWeight, thin_residual
from pyper.nn import PAGE_TOKENS, KVStore, Transformer
from pyper.nn.attention import Attention
from pyper.nn.block import Block
from pyper.nn.feed_forward import FeedForward


class ThinLayers:
    """The same function as `UsualLayers`, of blocks whose norms come first."""

    def __init__(self, cos: Tensor, sin: Tensor, n_tickets: int) -> None:
        """cos, sin: (S, K), of every position. n_tickets: texts · heads of keys at most."""
        self._cos, self._sin = cos, sin
        n_tickets = max(n_tickets, TICKETS)
        self._tickets = torch.zeros(n_tickets, dtype=torch.int32, device=cos.device)
        # A layer without positions turns by nothing.
        self._ones, self._zeros = torch.ones_like(self._cos), torch.zeros_like(self._sin)

    @staticmethod
    def fit(config: ExpertConfig) -> bool:
        """Whether the kernels can be the layers of such an expert."""
        by_head = not config.qk_norm or config.qk_norm_over == "head"
        return config.kind == "dense" and config.norm_position == "pre" and by_head

    @staticmethod
    def pay_for(model: Transformer, batch: int) -> bool:
        """Whether they run where the model is, and a batch is small enough."""
        weight = model.embedding.weight
        narrow = weight.dtype == torch.bfloat16 and batch <= MOST_ROWS
        runs = launch.runs_triton(weight) and _has_room(weight.device)
        return narrow and runs and ThinLayers.fit(model.config)

    def __call__(
        self, model: Transformer, store: KVStore, tokens: Tensor, positions: Tensor, pages: Tensor
    ) -> Tensor:
        """log p (B, V) float32 after tokens (B,) at positions (B,) of texts in pages (B, n)."""
        x = ThinRows(model.embedding(tokens))
        norms = _norms_of(model)
        for layer, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            i = 2 * layer
            kept = store.keys[layer], store.values[layer]
            x = self._attend(block, x, norms[i : i + 2], *kept, positions, pages)
            x = self._feed_forward(block, x, norms[i + 1 : i + 3])
        head = thin_weight(model.head)
        logits = thin_linear(x, head, norm=norms[-1], tickets=self._tickets, overlap=True)
        return logits.float().log_softmax(dim=-1)

    def _attend(
        self,
        block: Block,
        x: ThinRows,
        norms: list[InputNorm],
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        pages: Tensor,
    ) -> ThinRows:
        """norms: before and after."""
        attention = block.attention
        assert isinstance(attention, Attention)
        weight, tickets = thin_weight(attention.qkv), self._tickets
        rows = thin_linear(x, weight, norm=norms[0], tickets=tickets, overlap=True)
        parts = rows.split(attention.widths, dim=1)
        K = keys.shape[-1]
        query, key, value = (part.unflatten(1, (-1, K)) for part in parts)
        turn = self._turn_of(attention)
        mixed = paged_attention(
            *(query, key, value, keys, values, pages, positions, PAGE_TOKENS, turn),
            tickets=self._tickets,
            overlap=True,
        )
        return self._add(x, mixed.flatten(1), thin_weight(attention.out), norms[1])

    def _feed_forward(self, block: Block, x: ThinRows, norms: list[InputNorm]) -> ThinRows:
        """norms: before and after."""
        inner = block.feed_forward
        assert isinstance(inner, FeedForward)
        hidden = thin_linear(
            *(x, thin_weight(inner.up)),
            norm=norms[0],
            activation=inner.activation,
            tickets=self._tickets,
            overlap=True,
        )
        return self._add(x, hidden, thin_weight(inner.down), norms[1])

    def _add(
        self, x: ThinRows, inner: Tensor, weight: ThinWeight, next_norm: InputNorm
    ) -> ThinRows:
        """x + weight · inner."""
        given = (inner, weight, x.rows, next_norm)
        return thin_residual(*given, tickets=self._tickets, overlap=True)

    def _turn_of(self, attention: Attention) -> Turn:
        cos, sin = (self._cos, self._sin) if attention.rotates else (self._ones, self._zeros)
        if attention.q_norm is None or attention.k_norm is None:
            return Turn(cos, sin)
        gains = (attention.q_norm.weight, attention.k_norm.weight)
        return Turn(cos, sin, gains, attention.q_norm.eps)


def _norms_of(model: Transformer) -> list[InputNorm]:
    """In the order in which rows go through them: each product writes what the next one needs."""
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    norms = [norm for block in blocks for norm in (block.attention_norm, block.feed_forward_norm)]
    return [InputNorm(norm.weight, norm.eps) for norm in (*norms, model.norm)]


def _has_room(device: torch.device) -> bool:
    """Whether blocks of weights that are on their way fit a processor's shared memory."""
    if device.type != "cuda":
        return True
    # Not every build of torch knows it; what has so much does.
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 0)) >= SHARED_BYTES
