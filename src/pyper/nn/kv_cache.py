"""Keys and values of the tokens that were read, preallocated."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyper.config import ExpertConfig


@dataclass
class KVCache:
    """Keys and values (n_layers, B, kv_heads, capacity + 1, K), and the filled lengths (B,).

    Rows may have different lengths: what lies beyond a row's length is never attended to.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    chosen: Tensor | None = None
    """(E, B, capacity + 1), `token_mixture` only: which tokens each expert reads."""

    @classmethod
    def allocate(
        cls,
        config: ExpertConfig,
        batch: int,
        capacity: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> "KVCache":
        """Room for `capacity` tokens in each of `batch` rows."""
        # One slot more, for padding: where it would fall past the end it must not hit a real token.
        slots = capacity + 1
        # Attentions that are mixed count as layers: those of one layer stand together.
        n_layers = config.n_layers * max(config.attention_experts, 1)
        n_experts = config.routing.n_experts
        chosen = None
        if config.kind == "token_mixture":  # the stem, then every layer of every expert
            stem = config.routing.stem_layers
            n_layers = stem + n_experts * (n_layers - stem)
            chosen = torch.zeros(n_experts, batch, slots, dtype=torch.bool, device=device)
        shape = (n_layers, batch, config.kv_heads, slots, config.dim_per_head)
        return cls(
            keys=torch.zeros(shape, device=device, dtype=dtype),
            values=torch.zeros(shape, device=device, dtype=dtype),
            lengths=torch.zeros(batch, device=device, dtype=torch.long),
            chosen=chosen,
        )

    @property
    def capacity(self) -> int:
        """The most tokens that a row can hold."""
        return self.keys.shape[3] - 1

    def write(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Store keys and values (B, kv_heads, T, K) of one layer at positions (B, T)."""
        index = positions[:, None, :, None].expand_as(keys)
        self.keys[layer].scatter_(2, index, keys)
        self.values[layer].scatter_(2, index, values)

    def write_chosen(self, chosen: Tensor, positions: Tensor) -> None:
        """Store which experts read the tokens, chosen (E, B, T), at positions (B, T)."""
        assert self.chosen is not None
        self.chosen.scatter_(2, positions.expand_as(chosen), chosen)

    def select_rows(self, rows: Tensor) -> "KVCache":
        """A cache of some of the rows (copied)."""
        chosen = None if self.chosen is None else self.chosen[:, rows]
        return KVCache(self.keys[:, rows], self.values[:, rows], self.lengths[rows], chosen)

    def update_rows(self, rows: Tensor, part: "KVCache") -> None:
        """Put back what `select_rows` took out."""
        self.keys[:, rows] = part.keys
        self.values[:, rows] = part.values
        self.lengths[rows] = part.lengths
        if self.chosen is not None:
            assert part.chosen is not None
            self.chosen[:, rows] = part.chosen
