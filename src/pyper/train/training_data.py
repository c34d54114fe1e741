"""What one expert reads and is judged on."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyper.data import Documents, Packing, epoch_documents


@dataclass(frozen=True)
class TrainingData:
    """Documents to learn from, documents to be judged on, and how they are cut."""

    train: Documents
    valid: Documents
    seq_len: int
    loader_workers: int = 0
    domain_weights: Mapping[str, float] = field(default_factory=dict)
    """How often an epoch sees a domain; 1.0 where it is not named."""

    def windows(self, max_tokens: int) -> Tensor:
        """Windows (n, T) of training text, shuffled: the same ones every time it is asked."""
        train = self.train
        if self.domain_weights:
            train = train.select(epoch_documents(train, self.domain_weights, 0, 0))
        packing = Packing(train, seq_len=self.seq_len, random_seed=0, epoch=0, shuffle=True)
        n_windows = min(packing.n_sequences, max(1, max_tokens // self.seq_len))
        return torch.from_numpy(packing.sequences(range(n_windows))[:, :-1].copy())
