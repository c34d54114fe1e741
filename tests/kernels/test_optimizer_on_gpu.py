"""The optimizer's kernels, compiled: real sizes against torch's fused AdamW, no waits, graphs."""

import pytest
import torch
from torch import Tensor

from kernels.on_triton import error, needs_triton, random
from kernels.test_gpu import no_waiting
from pyper.config import ExpertConfig, TrainConfig
from pyper.nn import Transformer, init_weights
from pyper.train.optimizer import ExpertOptimizer

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    needs_triton,
]

FORMATS = [
    {"optimizer": name, "state_bits": bits, "weights": weights}
    for name in ("adamw", "muon")
    for bits in (8, 32)
    for weights in ("split", "stochastic")
]


def new_model(dtype: torch.dtype) -> Transformer:
    config = ExpertConfig(vocab_size=1000, d_model=256, n_layers=2, n_heads=2, d_ff=1024)
    model = Transformer(config)
    init_weights(model, 0)
    return model.to("cuda", dtype)


def new_optimizer(model: Transformer, **options: object) -> ExpertOptimizer:
    return ExpertOptimizer(model, TrainConfig(steps=1, learning_rate=1e-3, **options), 1e-3)


def give_gradients(model: Transformer, step: int) -> None:
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = random(*parameter.shape, seed=100 * step + i, dtype=parameter.dtype)


def run(model: Transformer, optimizer: ExpertOptimizer, step: int) -> None:
    give_gradients(model, step)
    optimizer.collect_gradients()
    optimizer.clip_gradients(torch.tensor(0.5, device="cuda"))
    optimizer.step(1.0 / (1 + step))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ten_steps_are_those_of_torchs_adamw(dtype: torch.dtype) -> None:
    model = new_model(dtype)
    masters = [torch.nn.Parameter(p.detach().float()) for p in model.parameters()]
    decays = [
        (n.startswith("blocks") and p.ndim > 1) or n == "head.weight"
        for n, p in model.named_parameters()
    ]
    groups = [
        {"params": [m for m, d in zip(masters, decays, strict=True) if d is on], "weight_decay": w}
        for on, w in ((True, 0.1), (False, 0.0))
    ]
    theirs = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    ours = new_optimizer(model)
    for step in range(10):
        give_gradients(model, step)
        for master, parameter in zip(masters, model.parameters(), strict=True):
            master.grad = 0.5 * parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        for group in theirs.param_groups:
            group["lr"] = 1e-3 / (1 + step)
        theirs.step()
        run(model, ours, step)
    for parameter, master in zip(model.parameters(), masters, strict=True):
        assert error(parameter, master) < (3e-3 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("options", FORMATS, ids=lambda o: "-".join(map(str, o.values())))
def test_the_host_never_waits_and_a_graph_does_what_was_recorded(
    options: dict[str, object],
) -> None:
    usual, recorded = new_model(torch.bfloat16), new_model(torch.bfloat16)
    one, other = new_optimizer(usual, **options), new_optimizer(recorded, **options)
    for step in range(3):
        run(usual, one, step)
        run(recorded, other, step)
    with no_waiting():
        give_and_update(usual, one)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        give_and_update(recorded, other)
    graph.replay()
    assert_same(usual, recorded)
    give_and_update(usual, one)
    graph.replay()
    assert_same(usual, recorded)


def give_and_update(model: Transformer, optimizer: ExpertOptimizer) -> None:
    """Gradients that follow from the weights."""
    for parameter in model.parameters():
        parameter.grad = parameter.detach() * 0.1 + 0.01
    optimizer.collect_gradients()
    optimizer.clip_gradients()
    optimizer.update_weights()


def assert_same(one: Transformer, other: Transformer) -> None:
    states: list[dict[str, Tensor]] = [one.state_dict(), other.state_dict()]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
