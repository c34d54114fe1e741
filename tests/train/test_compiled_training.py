"""`train.compile`: the same losses from compiled blocks."""

import shutil
from pathlib import Path

import pytest
import torch
from tiny_sparse import sparse_model
from tiny_training import new_config, new_model, new_plan, trace_of

from pyper.nn import Transformer
from pyper.train import TrainingData, train_expert

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the compiler warns of what it does itself
    pytest.mark.slow,
    pytest.mark.skipif(
        not (torch.cuda.is_available() or shutil.which("g++") or shutil.which("clang++")),
        reason="compiling for a CPU needs a C++ compiler",
    ),
]


@pytest.mark.parametrize("mode", ["dense", "expert_choice"])
def test_compiled_blocks_learn_what_others_learn(
    mode: str, training_data: TrainingData, tmp_path: Path
) -> None:
    traces = []
    for compiled in (False, True):
        model: Transformer = new_model() if mode == "dense" else sparse_model(mode)
        config = new_config(compile=compiled, recompute_blocks=1)
        train_expert(model, training_data, config, new_plan(), tmp_path / str(compiled))
        assert bool(model._compiled) is compiled
        traces.append([r["loss"] for r in trace_of(tmp_path / str(compiled)) if "loss" in r])
    assert traces[1] == pytest.approx(traces[0], rel=1e-4)
