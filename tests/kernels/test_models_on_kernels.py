"""Models that run on kernels compute what they compute without them."""

import pytest
import torch
from torch import Tensor

from kernels.on_triton import DEVICE, kernels, needs_triton
from pyper.config import ExpertConfig, SparseConfig
from pyper.data import Batch
from pyper.nn import Transformer, init_weights
from pyper.train import next_token_loss

pytestmark = needs_triton


def a_model(**changes: object) -> Transformer:
    values: dict[str, object] = {
        "kind": "sparse",
        "sparse": SparseConfig(n_experts=3, capacity_factor=1.5),
        "vocab_size": 37,
        "seq_len": 8,
        "bos_id": 0,
        "d_model": 12,
        "n_layers": 1,
        "n_heads": 2,
        "d_ff": 20,
    }
    model = Transformer(ExpertConfig(**values | changes))
    init_weights(model, 0)
    return model.to(DEVICE).train()


def loss_and_gradients(model: Transformer) -> tuple[Tensor, dict[str, Tensor]]:
    tokens = torch.randint(37, (2, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    loss = next_token_loss(model, Batch(tokens[:, :-1], tokens[:, 1:])).total
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"feed_forward_bias": True},
        {"activation": "swiglu"},
        {"sparse": SparseConfig(n_experts=3, gate="sigmoid", shared_d_ff=8)},
        {"kind": "dense", "sparse": None},
        {"kind": "dense", "sparse": None, "qk_norm": True, "n_kv_heads": 1},
    ],
    ids=["plain", "biases", "swiglu", "sigmoid and shared", "dense", "qk-norm"],
)
def test_losses_and_gradients_are_the_same_on_kernels(changes: dict[str, object]) -> None:
    usual, gradients = loss_and_gradients(a_model(**changes))
    with kernels():
        loss, others = loss_and_gradients(a_model(**changes))
    torch.testing.assert_close(loss, usual, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=2e-4, atol=2e-5, msg=name)
