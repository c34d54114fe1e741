"""Data for one tiny expert, and the way to train it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_training import SEQ_LEN, Train, new_config, new_model, new_plan, weights_of
from torch import Tensor

from pyper.config import TrainConfig
from pyper.data import TokenData
from pyper.train import TrainingData, TrainPlan, TrainResult, train_expert


@pytest.fixture
def training_data(two_domains: TokenData) -> TrainingData:
    return TrainingData(two_domains.documents("train"), two_domains.documents("valid"), SEQ_LEN)


@pytest.fixture
def short_data(two_domains: TokenData) -> TrainingData:
    """So few documents that eight steps cross the edge of an epoch, twice, inside a batch."""
    train = two_domains.documents("train").select(np.arange(3))
    return TrainingData(train, two_domains.documents("valid"), SEQ_LEN)


@pytest.fixture
def train(training_data: TrainingData, one_thread: None) -> Train:
    """Train a fresh tiny model; gives the result and the final weights."""

    def run(
        folder: Path,
        config: TrainConfig | None = None,
        plan: TrainPlan | None = None,
        *,
        data: TrainingData = training_data,
        dtype: torch.dtype = torch.float32,
        **others: Any,
    ) -> tuple[TrainResult, dict[str, Tensor]]:
        model = new_model(dtype)
        torch.manual_seed(0)
        result = train_expert(
            model, data, config or new_config(), plan or new_plan(), folder, **others
        )
        return result, weights_of(model)

    return run
