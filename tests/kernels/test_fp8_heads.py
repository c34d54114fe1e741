"""Heads from one product of 8-bit floats, turned in place."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels.narrow_casts import fp8_kernels
from kernels.on_triton import DEVICE, error, leaf, needs_triton, poisoned, random
from pyper.config import ExpertConfig
from pyper.kernels import rotated_heads_torch
from pyper.kernels.fp8_cast import E5M2
from pyper.kernels.fp8_heads import fp8_rotated_heads, fp8_rotated_heads_torch, turned_back_to_fp8
from pyper.kernels.rotary import turned_torch
from pyper.nn.attention import Attention
from pyper.nn.fp8_linear import use_fp8
from pyper.nn.rope import rotation

BF16 = torch.bfloat16
B, T, D, H, KV, K = 2, 16, 48, 4, 2, 16


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def turns() -> list[Tensor]:
    cos, sin = rotation(torch.arange(T, device=DEVICE), K, 10_000.0, None)
    return [cos.unsqueeze(-2), sin.unsqueeze(-2)]


def run(function: object, *, wide: bool = False) -> list[Tensor]:
    """Query, key, value, and the gradients of x and weight."""
    given = [random(B, T, D).to(BF16), (0.1 * random((H + 2 * KV) * K, D, seed=1)).to(BF16)]
    leaves = [leaf(x, torch.float64 if wide else None) for x in given]
    heads = function(*leaves, *([None] if wide else []), *turns(), H, KV)  # type: ignore[operator]
    grads = [random(*x.shape, seed=3 + i).to(x.dtype) for i, x in enumerate(heads)]
    torch.autograd.backward(heads, grads)
    return [*heads, *(x.grad for x in leaves)]  # type: ignore[list-item]


@needs_triton
def test_values_and_gradients_are_near_those_of_float64() -> None:
    with fp8_kernels():
        ours = run(fp8_rotated_heads)
    for mine, right in zip(ours, run(rotated_heads_torch, wide=True), strict=True):
        assert mine.dtype == BF16
        assert error(mine, right) < 0.08


@needs_triton
def test_kernels_do_what_plain_torch_does() -> None:
    with fp8_kernels():
        ours = run(fp8_rotated_heads)
    for mine, theirs in zip(ours, run(fp8_rotated_heads_torch), strict=True):
        # What rounds otherwise in bf16 may round otherwise in 8 bits.
        assert error(mine, theirs) < 0.03


@needs_triton
def test_it_compiles_without_a_break() -> None:
    compiled = torch.compile(fp8_rotated_heads, fullgraph=True, backend="aot_eager")
    with fp8_kernels():
        eager, graphs = run(fp8_rotated_heads), run(compiled)
    for mine, theirs in zip(graphs, eager, strict=True):
        assert torch.equal(mine, theirs)


@needs_triton
@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize(("n_heads", "n_kv", "dim"), [(4, 2, 16), (5, 1, 48), (9, 9, 8)])
def test_gradients_are_turned_back_into_both_layouts(
    n_heads: int, n_kv: int, dim: int, heads_first: bool
) -> None:
    cos, sin = rotation(torch.arange(6, device=DEVICE), dim, 10_000.0, None)
    parts = []
    for seed, heads in enumerate((n_heads, n_kv, n_kv)):
        shape = (3, heads, 6, dim) if heads_first else (3, 6, heads, dim)
        part = random(*shape, seed=seed).to(BF16)
        parts.append(part if heads_first else part.transpose(1, 2))
    turned = [
        turned_torch(x.transpose(1, 2).float(), cos[:, None], -sin[:, None]) for x in parts[:2]
    ]
    whole = torch.cat((*turned, parts[2].transpose(1, 2).float()), dim=2).view(18, -1)
    inverse = torch.tensor(256.0).to(DEVICE)
    with fp8_kernels(), poisoned():
        rows, columns = turned_back_to_fp8(*parts, cos, sin, inverse)
        torch.library.opcheck(turned_back_to_fp8, (*parts, cos, sin, inverse))
    assert torch.equal(rows.view(torch.uint8).T, columns.view(torch.uint8))
    # A few numbers lie so close to the middle of two that they round the other way.
    assert error(rows.float(), (whole * inverse).to(E5M2).float()) < 2e-3


def attention(**settings: object) -> Attention:
    shape = {"d_model": D, "n_layers": 1, "n_heads": H, "n_kv_heads": KV, "head_dim": K}
    config = ExpertConfig.model_validate(
        {"vocab_size": 8, "seq_len": T, "bos_id": 0, "d_ff": 32, **shape, **settings}
    )
    module = Attention(config, 0).to(DEVICE, BF16)
    use_fp8(torch.nn.ModuleList([module]))
    return module


@needs_triton
def test_the_module_uses_it_where_it_does_the_same() -> None:
    x = random(B, T, D).to(BF16)
    with fp8_kernels():
        assert attention().runs_as_one_in_fp8(x)
        assert not attention().eval().runs_as_one_in_fp8(x)
        assert not attention().runs_as_one_in_fp8(x[:1, :3])
        assert not attention(qk_norm=True).runs_as_one_in_fp8(x)
        assert not attention(attention_bias=True).runs_as_one_in_fp8(x)


@needs_triton
def test_the_module_gives_the_same_heads() -> None:
    module, x = attention(), random(B, T, D).to(BF16)
    plain = module.query_key_value(x, *turns())
    with fp8_kernels():
        ours = module.query_key_value(x, *turns())
    for mine, theirs in zip(ours, plain, strict=True):
        assert mine.shape == theirs.shape
        assert error(mine, theirs) < 8e-3
