"""Pyper trains, mixes, evaluates and runs tiny mixtures of experts.

    import pyper

    model = pyper.load("runs/quickstart")
    print(model.generate("def main("))

What is listed in `__all__` is imported when it is first used: `import pyper` takes no time, and
does not import torch. See docs/python.md.

Shapes are named by one legend everywhere: B batch, T time, D d_model, F d_ff, H heads,
K head_dim, V vocabulary, E experts, C capacity, N = B·T tokens.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from pyper.errors import PyperError

if TYPE_CHECKING:
    from pyper.api import (
        Model,
        Score,
        evaluate_run,
        evaluate_tasks,
        load,
        merge_run,
        prepare,
        train_expert,
        train_run,
    )
    from pyper.config import ExpertConfig, TrainConfig
    from pyper.mixture import Mixture
    from pyper.nn import Transformer

__version__ = "0.1.0"

__all__ = [
    "ExpertConfig",
    "Mixture",
    "Model",
    "PyperError",
    "Score",
    "TrainConfig",
    "Transformer",
    "evaluate_run",
    "evaluate_tasks",
    "load",
    "merge_run",
    "prepare",
    "train_expert",
    "train_run",
]

_HOMES = {
    "ExpertConfig": "pyper.config",
    "Mixture": "pyper.mixture",
    "TrainConfig": "pyper.config",
    "Transformer": "pyper.nn",
}

if not TYPE_CHECKING:  # or a name that does not exist would have a type

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module 'pyper' has no attribute '{name}'")
        value = globals()[name] = getattr(import_module(_HOMES.get(name, "pyper.api")), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
