"""All layers of a dense expert for one token of one text, as a single kernel.

A token of one text waits for memory: 3 GB of weights for 1.5 B parameters in bf16. Kernels of a
few microseconds, five a layer, leave it idle a third of the time: each ends, the next begins, asks
for its first weights and waits. Here as many programs as run at once go through all layers, and
meet where one reads what others wrote; what they read next is then already on its way
(persistent "megakernels": Spector et al., "Look Ma, No Bubbles!", 2025).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from pyper.config.expert import Activation
from pyper.kernels import launch
from pyper.kernels.launch import block_of
from pyper.kernels.row_linear import _STORED
from pyper.kernels.thin_linear import ThinWeight

if launch.HAS_TRITON:
    from pyper.kernels.whole_token_kernel import whole_token_kernel
    from pyper.kernels.whole_token_parts import NAMES

# Weights that a program has under way, programs of a processor, warps of a program.
_BLOCK_NUMBERS, _PER_PROCESSOR, _WARPS = 16_384, 2, 4
_MOST_PARTS, _PART_TOKENS = 16, 32
_N_PHASES = 6
# Of a program, at most.
SHARED_BYTES = 113 * 1024


@dataclass(frozen=True)
class TokenLayer:
    """What one layer reads; keys and values (n_slots, kv_heads, K) also grow."""

    attention_gain: Tensor
    qkv: ThinWeight
    qk_gains: tuple[Tensor, Tensor] | None
    cos: Tensor
    sin: Tensor
    keys: Tensor
    values: Tensor
    out: ThinWeight
    feed_forward_gain: Tensor
    up: ThinWeight
    down: ThinWeight


@dataclass(frozen=True)
class TokenShape:
    """The same in every layer."""

    n_heads: int
    n_kv_heads: int
    dim_per_head: int
    ff_dim: int
    activation: Activation
    eps: float
    page_tokens: int


class WholeToken:
    """One expert's layers, norm and head, ready to read one token of one text at a time."""

    def __init__(
        self, layers: Sequence[TokenLayer], final_gain: Tensor, head: ThinWeight, shape: TokenShape
    ) -> None:
        """Keeps the addresses of all weights: they must stay where they are."""
        self._layers, self._final_gain, self._head, self.shape = layers, final_gain, head, shape
        device, dtype = final_gain.device, final_gain.dtype
        addresses = [_addresses(layer) for layer in layers] + [[0] * len(NAMES)]
        self._table = torch.tensor(addresses, dtype=torch.long, device=device)
        self._is_gpu = device.type == "cuda"
        self._programs = _programs(device)
        A, s = shape.n_heads * shape.dim_per_head, shape
        self._parts = block_of(max(self._programs // s.n_kv_heads, 1), _MOST_PARTS)
        if self._parts * s.n_kv_heads > self._programs:
            self._parts //= 2
        widths = (s.dim_per_head * (s.n_heads + 2 * s.n_kv_heads), A, s.ff_dim, len(head.weight))
        self._qkv, self._mixed, self._hidden, self._logits = (
            torch.empty(width, device=device, dtype=dtype) for width in widths
        )
        self._other = torch.empty_like(final_gain)
        self._part = torch.empty(A * self._parts, device=device, dtype=torch.float32)
        self._log_sum = torch.empty(s.n_heads * self._parts, device=device, dtype=torch.float32)
        self._tickets = torch.zeros(s.n_kv_heads + 1, device=device, dtype=torch.int32)

    def __call__(self, x: Tensor, pages: Tensor, position: Tensor) -> Tensor:
        """Logits (V,), overwritten by the next call, after the token whose embedding is x (D,).

        x is overwritten. pages: (n,) int64, of the text in order; position: (1,) int64.
        """
        # Programs that wait for each other must all run; elsewhere (in Triton's interpreter) one
        # runs after another, so every phase of every layer is a launch.
        steps = [(-1, 0, len(self._layers))] if self._is_gpu else self._one_by_one()
        for phase, first, last in steps:
            self._launch(x, pages, position, phase, first, last)
        return self._logits

    def _one_by_one(self) -> list[tuple[int, int, int]]:
        n = len(self._layers)
        each = [(phase, i, i + 1) for i in range(n) for phase in range(_N_PHASES - 1)]
        return [*each, (_N_PHASES - 1, 0, 0)]

    def _launch(
        self, x: Tensor, pages: Tensor, position: Tensor, phase: int, first: int, last: int
    ) -> None:
        head, options = self._head, {"num_warps": _WARPS, "num_stages": 1}
        if self._is_gpu:
            options["launch_cooperative_grid"] = True
        whole_token_kernel[(self._programs,)](
            *(self._table, x, self._other, self._qkv, self._mixed, self._hidden, self._logits),
            *(self._part, self._log_sum, self._tickets, self._tickets[-1:], pages, position),
            *(self._final_gain, head.weight.view(torch.int32), head.scale, head.bias),
            *(first, last, self.shape.eps),
            PHASE=phase,
            HARDWARE=self._is_gpu and torch.version.hip is None,
            **self._constants(),
            **options,
        )

    def _constants(self) -> dict[str, Any]:
        """What the kernel is built for, beside the phase."""
        s, layer, head, D = self.shape, self._layers[0], self._head, len(self._final_gain)
        return {
            "D": D,
            "F": s.ff_dim,
            "V": len(head.weight),
            "H": s.n_heads,
            "KV_HEADS": s.n_kv_heads,
            "K": s.dim_per_head,
            "ACTIVATION": s.activation,
            "STORED": _STORED[layer.qkv.weight.dtype],
            "HEAD_STORED": _STORED[head.weight.dtype],
            "QK_NORM": layer.qk_gains is not None,
            "QKV_BIAS": layer.qkv.bias is not None,
            "OUT_BIAS": layer.out.bias is not None,
            "UP_BIAS": layer.up.bias is not None,
            "DOWN_BIAS": layer.down.bias is not None,
            "HEAD_BIAS": head.bias is not None,
            **self._block_sizes(),
            "PROGRAMS": self._programs,
            "PARTS": self._parts,
            "PAGE": s.page_tokens,
        }

    def _block_sizes(self) -> dict[str, int]:
        s, D = self.shape, len(self._final_gain)
        return {
            "BLOCK_OF_D": _block_rows(D, s.activation == "swiglu"),
            "BLOCK_OF_A": _block_rows(s.n_heads * s.dim_per_head),
            "BLOCK_OF_F": _block_rows(s.ff_dim),
            "BLOCK_OF_HEAD": _block_rows(D),
            # A product takes 16 rows at least.
            "BLOCK_G": max(block_of(s.n_heads // s.n_kv_heads, 1 << 20), 16),
            "BLOCK_S": _PART_TOKENS,
            "BLOCK_K": max(block_of(s.dim_per_head, 1 << 20), 16),
        }


def has_programs(device: torch.device, n_kv_heads: int) -> bool:
    """Whether each head of keys has a program of its own."""
    return _programs(device) >= n_kv_heads


def _programs(device: torch.device) -> int:
    """As many as run at once; 0 where there is no room for as many as keep the memory busy."""
    if device.type != "cuda":
        return 6
    properties = torch.cuda.get_device_properties(device)
    room = int(getattr(properties, "shared_memory_per_block_optin", 0))
    if room < _PER_PROCESSOR * SHARED_BYTES:
        return 0
    return _PER_PROCESSOR * int(properties.multi_processor_count)


def _block_rows(width: int, gated: bool = False) -> int:
    """Rows of a weight that a program has under way: a power of two."""
    room = _BLOCK_NUMBERS // (2 if gated else 1)
    rows = max(room // block_of(width, 1 << 30), 1)
    return 1 << (rows.bit_length() - 1)


def _addresses(layer: TokenLayer) -> list[int]:
    """In the order of NAMES."""
    found: dict[str, Tensor | None] = {}
    for field in fields(layer):
        value = getattr(layer, field.name)
        if isinstance(value, ThinWeight):
            found[field.name] = value.weight
            found[f"{field.name}_scale"] = value.scale
            found[f"{field.name}_bias"] = value.bias
        elif isinstance(value, Tensor):
            found[field.name] = value
    if layer.qk_gains is not None:
        found["query_gain"], found["key_gain"] = layer.qk_gains
    tensors = [found.get(name) for name in NAMES]
    return [0 if t is None else t.data_ptr() for t in tensors]
