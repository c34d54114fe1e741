"""What one expert reads and is judged on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyper.data import Documents, Packing


@dataclass(frozen=True)
class TrainingData:
    """Documents to learn from, documents to be judged on, and how they are cut."""

    train: Documents
    valid: Documents
    seq_len: int
    loader_workers: int = 0

    def windows(self, max_tokens: int) -> Tensor:
        """Windows (n, T) of training text, shuffled: the same ones every time it is asked."""
        packing = Packing(self.train, seq_len=self.seq_len, random_seed=0, epoch=0, shuffle=True)
        n_windows = min(packing.n_sequences, max(1, max_tokens // self.seq_len))
        return torch.from_numpy(packing.sequences(range(n_windows))[:, :-1].copy())
