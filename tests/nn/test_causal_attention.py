"""Attention written out for bfloat16 on CPUs: the same function as the fused one."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyper.nn import causal_attention as module
from pyper.nn.causal_attention import WrittenOutAttention, causal_attention


def heads(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()


def parts_of(length: int, rows: int = 2) -> Tensor:
    """(rows, 1, T, T): a text of each row attends within one of three parts of it, to the past."""
    part = torch.randint(3, (rows, length), generator=torch.Generator().manual_seed(7))
    same = part[:, :, None] == part[:, None, :]
    return (same & torch.ones(length, length, dtype=torch.bool).tril())[:, None]


# Lengths around the block of 128 queries.
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [1, 5, 127, 128, 129, 300])
def test_values_and_gradients_equal_the_fused_attention(length: int, masked: bool) -> None:
    inputs = [heads(2, 3, length, 8, seed=i) for i in range(3)]
    grad = heads(2, 3, length, 8, seed=3).detach()
    mask = parts_of(length) if masked else None

    ours = WrittenOutAttention.apply(*inputs, mask)
    fused = F.scaled_dot_product_attention(*inputs, attn_mask=mask, is_causal=not masked)

    torch.testing.assert_close(ours, fused)
    expected = torch.autograd.grad(fused, inputs, grad)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs, grad), expected)


def test_gradients_agree_with_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 2)
    inputs = tuple(heads(1, 2, 5, 4, seed=i) for i in range(3))
    assert torch.autograd.gradcheck(WrittenOutAttention.apply, (*inputs, None))
    assert torch.autograd.gradcheck(WrittenOutAttention.apply, (*inputs, parts_of(5, rows=1)))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_bfloat16_is_as_near_to_float64_as_the_fused_attention(kv_heads: int, masked: bool) -> None:
    mask = parts_of(200) if masked else None
    exact = [heads(2, h, 200, 16, seed=h) for h in (4, kv_heads, kv_heads)]
    narrow = [x.detach().bfloat16().requires_grad_() for x in exact]
    grad = heads(2, 4, 200, 16, seed=9).detach()

    def gradients(inputs: list[Tensor], out: Tensor) -> list[Tensor]:
        return [out.double(), *(g.double() for g in torch.autograd.grad(out, inputs, grad.to(out)))]

    def fused(inputs: list[Tensor]) -> Tensor:
        return F.scaled_dot_product_attention(
            *inputs, attn_mask=mask, is_causal=not masked, enable_gqa=True
        )

    wanted = gradients(exact, fused(exact))
    reference = gradients(narrow, fused(narrow))
    got = gradients(narrow, causal_attention(*narrow, mask))
    for true, theirs, ours in zip(wanted, reference, got, strict=True):
        assert (ours - true).norm() < 1.5 * (theirs - true).norm()


def test_only_short_bfloat16_sequences_on_a_cpu_are_written_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths = []

    def spy(query: Tensor, key: Tensor, value: Tensor, mask: None) -> Tensor:
        lengths.append(query.shape[2])
        return query

    monkeypatch.setattr(module.WrittenOutAttention, "apply", spy)
    for length, dtype in ((64, torch.bfloat16), (64, torch.float32), (1025, torch.bfloat16)):
        x = torch.zeros(1, 1, length, 8, dtype=dtype)
        causal_attention(x, x, x)
    assert lengths == [64]
