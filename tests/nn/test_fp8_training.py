"""Training in fp8 comes out where bf16 does."""

import torch

from nn.small_experts import small_config
from pyper.nn import Transformer, init_weights
from pyper.nn.fp8_linear import use_fp8

V, T, STEPS = 32, 32, 200


def tokens_of(batch: int, draw: torch.Generator) -> torch.Tensor:
    """(batch, T + 1), each token drawn by a table of the two before it, summed."""
    tables = 2 * torch.randn(2, V, V, generator=torch.Generator().manual_seed(0))
    rows = [torch.randint(V, (batch,), generator=draw) for _ in range(2)]
    for _ in range(T - 1):
        odds = (tables[0, rows[-1]] + tables[1, rows[-2]]).softmax(dim=-1)
        rows.append(torch.multinomial(odds, 1, generator=draw).squeeze(1))
    return torch.stack(rows, dim=1)


def loss_after_training(fp8: bool) -> float:
    """The mean of the last 40 of 200 steps."""
    model = Transformer(small_config(d_model=64, n_layers=2, n_heads=2, d_ff=256, vocab_size=V))
    init_weights(model, 0)
    if fp8:
        use_fp8(model.blocks)
    # Weights in float32, as an optimizer keeps them; blocks read them in bf16.
    masters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    model = model.bfloat16().train()
    optimizer = torch.optim.AdamW(masters, lr=3e-3)
    draw, losses = torch.Generator().manual_seed(1), []
    for _ in range(STEPS):
        batch = tokens_of(32, draw)
        logits = model(batch[:, :-1]).float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient.float()
        optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(model.parameters(), masters, strict=True):
                parameter.copy_(master)
        losses.append(float(loss.detach()))
    return sum(losses[-40:]) / 40


def test_two_hundred_steps_end_within_half_a_percent_of_bf16() -> None:
    usual, narrow = loss_after_training(False), loss_after_training(True)
    assert usual < 2.5  # of ln 32 = 3.47: something was learned
    assert abs(narrow - usual) < 0.005 * usual
