"""Training loops of several experts whose steps are taken at once, and the same loops alone."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tiny_training import new_config, new_model, new_plan, weights_of
from torch import Tensor

from pyper.train import Schedule, TrainingData, TrainResult, train_expert
from pyper.train.stacked_steps import StackedSteps

SECONDS = 60
"""A test that takes longer hangs."""
Loop = Callable[[StackedSteps, int], Any]


class Expert:
    """One expert's part of a test: what it trains with."""

    def __init__(self, steps: int = 8, seed: int = 5, **config: Any) -> None:
        rate = config.pop("rate", 3e-3)
        self.config = new_config(**{"steps": steps} | config)
        self.plan = new_plan(
            steps,
            random_seed=seed,
            learning_rate=rate,
            schedule=Schedule("wsd", steps, 2, 0.5, 0.0),
        )


def at_once(loops: Sequence[Loop]) -> list[Any]:
    """What the loops return; fails instead of waiting for ever."""
    steps = StackedSteps(len(loops))

    def run() -> list[Any]:
        with ThreadPoolExecutor(len(loops)) as pool:
            futures = [pool.submit(loop, steps, i) for i, loop in enumerate(loops)]
            steps.run()
        return [future.exception() or future.result() for future in futures]

    done: Future[list[Any]] = Future()
    threading.Thread(target=lambda: done.set_result(run()), daemon=True).start()
    return done.result(timeout=SECONDS)


def loop_of(
    expert: Expert, data: TrainingData, folder: Path, dtype: torch.dtype, **others: Any
) -> Loop:
    def loop(steps: StackedSteps, number: int) -> tuple[TrainResult, dict[str, Tensor]]:
        with steps.loop(number) as new_step:
            model = new_model(dtype)
            result = train_expert(
                model, data, expert.config, expert.plan, folder, new_step=new_step, **others
            )
            return result, weights_of(model)

    return loop


def alone(
    expert: Expert, data: TrainingData, folder: Path, dtype: torch.dtype
) -> tuple[TrainResult, dict[str, Tensor]]:
    model = new_model(dtype)
    return train_expert(model, data, expert.config, expert.plan, folder), weights_of(model)
