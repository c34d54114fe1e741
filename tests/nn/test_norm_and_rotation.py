import math

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from nn.small_experts import small_config, small_expert
from pyper.config import RopeScaling
from pyper.kernels.activation import activate
from pyper.nn.attention import Attention, AttentionContext, document_mask
from pyper.nn.documents import document_ids, positions
from pyper.nn.feed_forward import FeedForward
from pyper.nn.norm import RMSNorm
from pyper.nn.rope import apply_rotation, inverse_frequencies, rotation


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def turn(at: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of positions (...), broadcast over heads."""
    cos, sin = rotation(at, head_dim, theta, None)
    return cos.unsqueeze(-2), sin.unsqueeze(-2)


def assert_gradients(module: torch.nn.Module, x: Tensor, *more: object) -> None:
    """Derivatives by x and by every parameter agree with finite differences."""
    names = [name for name, _ in module.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in module.parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(names, parameters, strict=True))
        return functional_call(module, named, (x, *more))

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *values))


@pytest.mark.parametrize(
    "changes",
    [{}, {"n_kv_heads": 1}, {"qk_norm": True}, {"attention_bias": True, "n_kv_heads": 1}],
)
@pytest.mark.parametrize("across", [True, False])
def test_gradients_of_attention_agree_with_finite_differences(
    changes: dict[str, object], across: bool
) -> None:
    config = small_config(d_model=8, n_heads=2, **changes)
    attention = small_expert(d_model=8, n_heads=2, **changes).blocks[0].attention.double()
    assert isinstance(attention, Attention)
    tokens = torch.tensor([[3, 4, 0, 5, 6]])
    at = torch.arange(5) if across else positions(tokens, 0)
    mask = None if across else document_mask(document_ids(tokens, 0))
    context = AttentionContext(*turn(at, config.dim_per_head, 10_000.0), mask)
    assert_gradients(attention, normal(1, 5, 8), context, 0)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu", "relu2"])
def test_gradients_of_the_feed_forward_agree_with_finite_differences(activation: str) -> None:
    config = small_config(d_model=4, n_heads=2, d_ff=6, activation=activation)
    assert_gradients(FeedForward(config).double(), normal(1, 3, 4))


def test_gradients_of_norm_and_rotation_agree_with_finite_differences() -> None:
    norm = RMSNorm(6, 1e-3).double()
    assert_gradients(norm, normal(2, 3, 6))
    cos, sin = turn(torch.arange(3), 4, 100.0)
    x = normal(1, 3, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: apply_rotation(x, cos.double(), sin.double()), (x,))


def test_norm_matches_its_formula() -> None:
    norm = RMSNorm(8, 0.1)
    norm.weight.data = normal(8, seed=1, dtype=torch.float32)
    x = normal(3, 8, dtype=torch.float32)
    expected = norm.weight * x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt()
    torch.testing.assert_close(norm(x), expected)


def test_norm_of_bfloat16_takes_its_statistics_in_float32() -> None:
    norm = RMSNorm(4096, 1e-6).bfloat16()
    x = normal(4, 4096, dtype=torch.float32).bfloat16() * 1e-3
    wide = x.float()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x), exact.bfloat16(), atol=0, rtol=2**-8)
    # A sum of 4096 squares in bfloat16 stops growing at a fraction of its value.
    total = torch.zeros(4, dtype=torch.bfloat16)
    for column in x.square().T:
        total += column
    narrow = x / (total[:, None] / 4096 + 1e-6).sqrt()
    assert (narrow.float() - exact).abs().max() > 0.1


def test_rotation_turns_each_pair_by_its_angle() -> None:
    x = normal(1, 5, 1, 6)
    cos, sin = turn(torch.arange(5), 6, 100.0)
    got = apply_rotation(x, cos.double(), sin.double())[0, :, 0]
    for position in range(5):
        for pair in range(3):
            angle = position * 100.0 ** (-2 * pair / 6)
            number = complex(x[0, position, 0, pair], x[0, position, 0, pair + 3])
            turned = number * complex(math.cos(angle), math.sin(angle))
            expected = torch.tensor([turned.real, turned.imag], dtype=torch.float64)
            torch.testing.assert_close(
                got[position, [pair, pair + 3]], expected, atol=1e-6, rtol=1e-6
            )


def test_attention_depends_on_distances_only() -> None:
    query, key = normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=1)

    def product(query_at: int, key_at: int) -> Tensor:
        turned = [
            apply_rotation(x, *turn(torch.tensor([at]), 8, 10_000.0))
            for x, at in ((query, query_at), (key, key_at))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(product(9, 4), product(109, 104), atol=1e-4, rtol=1e-4)
    assert (product(9, 4) - product(9, 5)).abs() > 1e-2


def test_rotation_of_bfloat16_is_computed_in_float32() -> None:
    x = normal(1, 2048, 1, 8).bfloat16()
    cos, sin = turn(torch.arange(2048), 8, 10_000.0)
    assert cos.dtype == torch.float32
    got = apply_rotation(x, cos, sin)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, apply_rotation(x.float(), cos, sin).bfloat16())


@pytest.mark.parametrize(("head_dim", "factor"), [(4, 2.0), (16, 8.0)])
def test_ntk_scaling_raises_the_base(head_dim: int, factor: float) -> None:
    scaling = RopeScaling(kind="ntk", factor=factor)
    got = inverse_frequencies(head_dim, 10_000.0, scaling, torch.device("cpu"))
    base = 10_000.0 * factor ** (head_dim / (head_dim - 2))
    naive = [1 / base ** (2 * pair / head_dim) for pair in range(head_dim // 2)]
    torch.testing.assert_close(got, torch.tensor(naive))
    # The fastest pair keeps its speed, the slowest is interpolated by exactly the factor.
    plain = inverse_frequencies(head_dim, 10_000.0, None, torch.device("cpu"))
    torch.testing.assert_close((plain / got)[[0, -1]], torch.tensor([1.0, factor]))


def test_documents_are_numbered_and_positions_restart() -> None:
    tokens = torch.tensor([[5, 6, 0, 7, 0, 0, 8], [0, 1, 2, 3, 0, 4, 5]])
    assert document_ids(tokens, 0).tolist() == [[0, 0, 1, 1, 2, 3, 3], [1, 1, 1, 1, 2, 2, 2]]
    assert positions(tokens, 0).tolist() == [[0, 1, 0, 1, 0, 0, 1], [0, 1, 2, 3, 0, 1, 2]]


def test_relu2_and_swiglu_match_their_formulas() -> None:
    x = normal(2, 8)
    squared = activate(x, "relu2")
    torch.testing.assert_close(squared, x.clamp(min=0) ** 2)
    gated = activate(x, "swiglu")
    gate, value = x[:, :4], x[:, 4:]
    torch.testing.assert_close(gated, gate / (1 + (-gate).exp()) * value)
