"""Where documents begin in packed tokens: each starts with the token `bos_id`."""

import torch
from torch import Tensor


def document_ids(tokens: Tensor, bos_id: int) -> Tensor:
    """Number of the document each token belongs to, int64 (B, T), of tokens (B, T).

    Counts from 0 in each row where the row starts inside a document, from 1 where it starts one.
    """
    return (tokens == bos_id).cumsum(dim=-1)


def positions(tokens: Tensor, bos_id: int) -> Tensor:
    """Position of each token in its document, int64 (B, T), of tokens (B, T).

    The first document of a row counts from the start of the row: where it began is out of sight.
    """
    index = torch.arange(tokens.shape[-1], device=tokens.device).expand_as(tokens)
    starts = torch.where(tokens == bos_id, index, torch.zeros_like(index))
    return index - starts.cummax(dim=-1).values
