"""Expert choice with its inverse: which tokens each expert took, and who took each token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyper.kernels import launch
from pyper.kernels.launch import block_of

if launch.HAS_TRITON:
    import triton
    import triton.language as tl


@dataclass(frozen=True)
class Choice:
    """Who reads what. Nothing of it has a gradient."""

    token_index: Tensor
    """(E, C) int64: the tokens of each expert, all different, in no order."""
    slots: Tensor
    """(N, E) int32, the inverse: the place of a token among an expert's, −1 where not taken."""
    kth_score: Tensor
    """(E,), the lowest score taken."""


def choose(scores: Tensor, capacity: int, padding: Tensor | None = None) -> Choice:
    """Each expert's `capacity` highest of scores (N, E) (arXiv:2202.09368, eq. 1).

    padding: (N,), True where there is no token; taken last of all.
    """
    scores = scores.detach()
    if padding is not None:
        scores = scores.masked_fill(padding[:, None], -torch.inf)
    top = scores.T.topk(capacity, dim=-1, sorted=False)
    slots = slots_of(top.indices, len(scores))
    return Choice(top.indices, slots, top.values.amin(dim=-1))


def slots_of(token_index: Tensor, n_tokens: int) -> Tensor:
    """The inverse (N, E) int32 of token_index (E, C) of `n_tokens` tokens; see `Choice.slots`."""
    if launch.runs_triton(token_index):
        return invert(token_index.contiguous(), n_tokens)
    return slots_of_torch(token_index, n_tokens)


def slots_of_torch(token_index: Tensor, n_tokens: int) -> Tensor:
    """The twin of `slots_of`, in plain torch."""
    E, C = token_index.shape
    slots = token_index.new_full((n_tokens, E), -1, dtype=torch.int32)
    places = torch.arange(C, dtype=torch.int32, device=token_index.device).expand(E, C)
    return slots.scatter_(0, token_index.T, places.T)


@torch.library.custom_op("pyper::invert", mutates_args=())
def invert(token_index: Tensor, n_tokens: int) -> Tensor:
    """`slots_of` of a contiguous token_index. Every place is written at most once."""
    E, C = token_index.shape
    slots = token_index.new_full((n_tokens, E), -1, dtype=torch.int32)
    block = block_of(C, 1024)
    _invert[(E, triton.cdiv(C, block))](token_index, slots, C, E=E, BLOCK_C=block, num_warps=4)
    return slots


@invert.register_fake
def _(token_index: Tensor, n_tokens: int) -> Tensor:
    return token_index.new_empty((n_tokens, len(token_index)), dtype=torch.int32)


if launch.HAS_TRITON:

    @triton.jit
    def _invert(index_ptr, slots_ptr, C, E: tl.constexpr, BLOCK_C: tl.constexpr):
        e = tl.program_id(0)
        c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        n = tl.load(index_ptr + e.to(tl.int64) * C + c, mask=c < C, other=0)
        tl.store(slots_ptr + n * E + e, c, mask=c < C)
