"""Muon: orthogonal updates of matrices and of the parts of fused ones."""

from typing import Any

import pytest
import torch
from tiny_training import SEQ_LEN, give_gradients, new_config, random_gradients, weights_of
from torch import Tensor

from pyper.config import ExpertConfig
from pyper.nn import Transformer, init_weights
from pyper.train.muon import Muon, orthogonalize
from pyper.train.optimizer import ExpertOptimizer
from pyper.train.trained_weight import TrainedWeight

ONE = torch.tensor(1.0)


def new_weight(start: Tensor) -> TrainedWeight:
    return TrainedWeight("weight", torch.nn.Parameter(start.clone()))


@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64), (48, 16)])
def test_orthogonalize_brings_all_singular_values_near_one(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    matrices = torch.randn(5, *shape, generator=generator) * 1e-3

    values = torch.linalg.svdvals(orthogonalize(matrices))

    assert values.min() > 0.6
    assert values.max() < 1.3


def test_orthogonalize_keeps_the_singular_vectors() -> None:
    left, _ = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
    right, _ = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))
    matrix = left @ torch.diag(torch.linspace(1.0, 2.0, 8)) @ right

    middle = left.T @ orthogonalize(matrix[None])[0] @ right.T

    torch.testing.assert_close(middle, torch.diag(middle.diag()), atol=1e-4, rtol=0)
    assert (middle.diag() > 0.6).all()


def test_orthogonalize_of_nothing_is_nothing() -> None:
    assert orthogonalize(torch.zeros(1, 4, 4)).eq(0).all()


def test_muon_treats_query_key_and_value_as_three_matrices() -> None:
    """Grouped heads: the three differ in height. One fused step equals three separate ones."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(16 + 8 + 8, 16, generator=generator)
    gradient = torch.randn(start.shape, generator=generator) * torch.linspace(1, 9, 32)[:, None]
    rows = (16, 8, 8)
    fused = new_weight(start)
    parts = [new_weight(part) for part in start.split(rows)]
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    whole = Muon([fused], row_splits=[rows], **options)
    apart = Muon(parts, row_splits=[None] * 3, **options)
    for _ in range(3):
        fused.parameter.grad = gradient.clone()
        for part, g in zip(parts, gradient.split(rows), strict=True):
            part.parameter.grad = g.clone()
        whole.step(ONE)
        apart.step(ONE)

    together = torch.cat([p.parameter.detach() for p in parts])
    torch.testing.assert_close(fused.parameter.detach(), together)
    unsplit = new_weight(start)
    unsplit.parameter.grad = gradient
    Muon([unsplit], row_splits=[None], **options).step(ONE)
    assert not torch.allclose(unsplit.parameter, fused.parameter)


def test_muon_of_an_expert_splits_its_fused_matrix_and_leaves_the_rest_to_adamw() -> None:
    config = ExpertConfig(
        vocab_size=257, seq_len=SEQ_LEN, d_model=16, n_layers=1, n_heads=4, n_kv_heads=2
    )
    model = Transformer(config)
    init_weights(model, 0)
    optimizer = ExpertOptimizer(model, new_config(optimizer="muon", weight_decay=0.0), 3e-3)
    before = weights_of(model)
    give_gradients(model, random_gradients(1), optimizer)
    optimizer.step(1.0)

    update = {name: (before[name] - w) for name, w in weights_of(model).items()}
    fused = next(n for n in update if n.endswith("qkv.weight"))
    for part in update[fused].split((16, 8, 8)):
        values = torch.linalg.svdvals(part / 0.02)
        assert 0.6 < values.min() <= values.max() < 1.3
    # Adam's first step moves every weight by the rate
    torch.testing.assert_close(
        update["embedding.weight"].abs(), torch.full((257, 16), 3e-3), rtol=1e-2, atol=0
    )
