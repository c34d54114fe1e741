"""Blocks that compute their activations again train as those that keep them."""

from pathlib import Path

import pytest
import torch
from tiny_sparse import MODES, sparse_model
from tiny_training import SEQ_LEN, new_config, new_model, new_plan, trace_of, weights_of

from pyper.data import Batch
from pyper.nn import Transformer
from pyper.train import TrainingData, next_token_loss, train_expert

pytestmark = pytest.mark.usefixtures("one_thread")


def a_batch() -> Batch:
    tokens = torch.randint(257, (6, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))
    return Batch(tokens[:, :-1], tokens[:, 1:])


def kept_bytes(model: Transformer) -> int:
    """Of everything that a forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        next_token_loss(model, a_batch())
    return sum(kept.values())


@pytest.mark.parametrize("mode", ["dense", *MODES])
@pytest.mark.parametrize("blocks", [1, 2])
def test_weights_thresholds_and_logs_are_the_same_to_the_bit(
    mode: str, blocks: int, training_data: TrainingData, tmp_path: Path
) -> None:
    results = []
    for n in (0, blocks):
        model = new_model() if mode == "dense" else sparse_model(mode)
        config = new_config(recompute_blocks=n, micro_batch_size=2)
        train_expert(model, training_data, config, new_plan(), tmp_path / str(n))
        assert model.recompute_blocks == n
        results.append((weights_of(model), trace_of(tmp_path / str(n))))
    (kept, kept_trace), (again, trace) = results
    assert trace == kept_trace
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_recomputed_blocks_keep_less() -> None:
    sizes = []
    for blocks in range(3):
        model = new_model().train()
        model.recompute_blocks = blocks
        sizes.append(kept_bytes(model))
    assert sizes[0] > sizes[1] > sizes[2]


def test_evaluation_recomputes_nothing() -> None:
    model = new_model().eval()
    model.recompute_blocks = 2
    usual = new_model().eval()
    tokens = a_batch().tokens
    with torch.no_grad():
        assert torch.equal(model(tokens), usual(tokens))
    assert kept_bytes(model) == kept_bytes(usual)


def test_without_a_gpu_auto_keeps_all(training_data: TrainingData, tmp_path: Path) -> None:
    model = new_model()
    train_expert(model, training_data, new_config(), new_plan(), tmp_path)
    assert model.recompute_blocks == 0
