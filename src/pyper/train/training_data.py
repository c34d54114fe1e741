"""What one expert reads and is judged on."""

from dataclasses import dataclass

from pyper.data import Documents


@dataclass(frozen=True)
class TrainingData:
    """Documents to learn from, documents to be judged on, and how they are cut."""

    train: Documents
    valid: Documents
    seq_len: int
    loader_workers: int = 0
