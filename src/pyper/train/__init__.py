"""Train one expert: optimizers, schedules, early stopping, the step and the loop."""

from pyper.train.loop import TrainPlan, TrainResult, train_expert
from pyper.train.loss import BatchTransform, LossFunction, LossSum, next_token_loss, token_loss
from pyper.train.schedule import Schedule, branch_schedule, seed_schedule
from pyper.train.training_data import TrainingData

__all__ = [
    "BatchTransform",
    "LossFunction",
    "LossSum",
    "Schedule",
    "TrainPlan",
    "TrainResult",
    "TrainingData",
    "branch_schedule",
    "next_token_loss",
    "seed_schedule",
    "token_loss",
    "train_expert",
]
