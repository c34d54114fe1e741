"""The norm of all gradients of a model: each is read once, those of one type side by side."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from pyper.kernels import launch
from pyper.kernels.launch import wide
from pyper.kernels.multi_tensor import TableCache, as_aligned, triton_type

if launch.HAS_TRITON:
    import triton
    import triton.language as tl

    from pyper.kernels.multi_tensor import pointer, read

# Numbers of a program, and its warps: 64 bytes of bf16 on their way for each thread.
_PIECE, _WARPS = 8192, 8


def gradient_norm(weights: Sequence[Tensor], grads: Sequence[Tensor], tables: TableCache) -> Tensor:
    """√ Σ g² over all numbers of all gradients, float32 (or float64 of such), no dimensions.

    weights: those that the gradients are of; a table of their sizes is kept in `tables`. Sums are
    in a fixed order, and nothing waits for the device.
    """
    if not launch.runs_triton(grads[0]):
        return gradient_norm_torch(weights, grads, tables)
    kinds: dict[torch.dtype, list[int]] = defaultdict(list)
    for i, grad in enumerate(grads):
        kinds[grad.dtype].append(i)
    squares = [
        _sum_of_squares([weights[i] for i in kind], [as_aligned(grads[i]) for i in kind], tables)
        for kind in kinds.values()
    ]
    return torch.stack(squares).sum().sqrt()


def gradient_norm_torch(
    weights: Sequence[Tensor], grads: Sequence[Tensor], tables: TableCache
) -> Tensor:
    """The twin of `gradient_norm`, in plain torch."""
    norms = torch._foreach_norm(list(grads), 2.0, dtype=wide(grads[0].dtype))
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def _sum_of_squares(weights: list[Tensor], grads: list[Tensor], tables: TableCache) -> Tensor:
    """Of gradients of one type."""
    key = ("gradient norm", grads[0].dtype, tuple(w.numel() for w in weights))
    table = tables.get(key, [weights], _PIECE)
    given = table.changing(grads)
    launches = table.launches()
    sums = grads[0].new_empty(sum(len(p) for p, _ in launches), dtype=torch.float32)
    first = 0
    for pieces, masked in launches:
        _squares[(len(pieces),)](
            *(given, table.sizes, pieces, sums[first:]),
            GRAD=triton_type(grads[0].dtype),
            MASKED=masked,
            PIECE=_PIECE,
            num_warps=_WARPS,
        )
        first += len(pieces)
    return sums.sum()


if launch.HAS_TRITON:

    @triton.jit
    def _squares(
        grads,
        sizes,
        pieces,
        sums_ptr,
        GRAD: tl.constexpr,
        MASKED: tl.constexpr,
        PIECE: tl.constexpr,
    ):
        tensor = tl.load(pieces + 2 * tl.program_id(0))
        piece = tl.load(pieces + 2 * tl.program_id(0) + 1).to(tl.int64)
        at = piece * PIECE + tl.arange(0, PIECE)
        inside = at < tl.load(sizes + tensor)
        x = read(pointer(grads + tensor, GRAD, True) + at, inside, MASKED).to(tl.float32)
        tl.store(sums_ptr + tl.program_id(0), tl.sum(x * x, axis=0))
