"""`train.compile`: the same losses from compiled blocks."""

import shutil
from pathlib import Path

import pytest
import torch
from tiny_sparse import sparse_model
from tiny_training import SEQ_LEN, new_config, new_model, new_plan, trace_of
from torch._dynamo.testing import CompileCounter

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


@pytest.mark.parametrize("mode", ["threshold", "loss"])
def test_numbers_of_tokens_that_change_compile_nothing_anew(mode: str) -> None:
    """On a CPU, where experts run one after another; by thresholds from the fourth step on."""
    graphs = CompileCounter()
    torch.compiler.reset()
    model = sparse_model(mode).train()
    model._compiled = [torch.compile(block, backend=graphs) for block in model.blocks]
    seen = []
    for step in range(8):
        model.begin_step(step / 8)
        tokens = torch.randint(257, (4, SEQ_LEN), generator=torch.Generator().manual_seed(step))
        model(tokens).square().mean().backward()
        model.end_step()
        seen.append(graphs.frame_count)
    assert len(set(seen[4:])) == 1
    assert len(set(seen)) <= (2 if mode == "threshold" else 1)
