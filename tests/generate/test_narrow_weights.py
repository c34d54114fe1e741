"""Eight-bit weights: how far off they are, and that the text stays the same."""

from typing import Any

import pytest
import torch

from generate.test_writing_text import BYTES, scripted
from mixture.small_mixtures import loaders_of, small_settings
from nn.small_experts import small_expert, text_of
from pyper.config import SparseConfig
from pyper.generate import Narrow, SamplingConfig, complete, with_narrow_weights
from pyper.generate.narrow_weights import NarrowLinear, narrow_model, quantize_rows
from pyper.mixture import Mixture
from pyper.nn import Transformer, init_weights

WIDE: dict[str, Any] = {"d_model": 128, "d_ff": 256, "n_layers": 3, "vocab_size": 257}


def initialised(**shape: Any) -> Transformer:
    """Weights as training finds them, not the wild ones of other tests; sharper outputs."""
    model = small_expert(**WIDE | shape)
    init_weights(model, seed=0)
    with torch.no_grad():
        model.head.weight *= 20
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_off_by_half_a_scale_at_most(dtype: torch.dtype) -> None:
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[2] = 0
    weight[3] *= 1e-30
    integers, scale = quantize_rows(weight, "int8")
    assert integers.abs().max() == 127
    off = (integers * scale[:, None] - weight.float()).abs().amax(dim=1)
    assert (off <= 0.5001 * scale).all()
    assert (integers[2] == 0).all()
    assert integers[3].abs().max() == 127  # a small row loses nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floats_of_eight_bits_are_off_by_a_sixteenth_of_the_value(dtype: torch.dtype) -> None:
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[2] = 0
    weight[3] *= 1e-30
    narrow, scale = quantize_rows(weight, "fp8")
    assert narrow.float().abs().amax(dim=1)[[0, 1, 3]].tolist() == [448.0] * 3
    off = (narrow.float() * scale[:, None] - weight.float()).abs()
    # below 2^-6 the format has no more bits than 2^-9
    assert (off <= weight.float().abs() / 16 + scale[:, None] * 2**-10).all()
    assert (narrow[2].float() == 0).all()


@pytest.mark.parametrize("narrow", ["int8", "fp8"])
def test_a_product_is_that_of_the_widened_weights(narrow: Narrow) -> None:
    linear = torch.nn.Linear(40, 9)
    eight = NarrowLinear(linear, narrow)
    widened = eight.weight.float() * eight.scale[:, None]
    x = torch.randn(3, 40)
    expected = torch.nn.functional.linear(x, widened, linear.bias)
    torch.testing.assert_close(eight(x), expected)


@pytest.mark.parametrize("narrow", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"n_kv_heads": 2, "activation": "swiglu", "tie_embeddings": True},
        {"kind": "sparse", "sparse": SparseConfig(n_experts=2, shared_d_ff=32)},
    ],
)
@torch.no_grad()
def test_logits_stay_close_and_the_likeliest_tokens_the_same(
    shape: dict[str, Any], dtype: torch.dtype, narrow: Narrow
) -> None:
    tokens = text_of(8, 40, vocab_size=257)
    expected = initialised(**shape).to(dtype)(tokens).float()
    model = narrow_model(initialised(**shape).to(dtype), narrow)
    got = model(tokens).float()
    # three bits of mantissa instead of seven beside the sign
    limit, least = {"int8": (0.03, 0.95), "fp8": (0.1, 0.85)}[narrow]
    assert 0 < (got - expected).norm() / expected.norm() < limit
    assert (got.argmax(-1) == expected.argmax(-1)).float().mean() > least
    n_bytes = sum(t.nbytes for t in model.state_dict().values())
    assert n_bytes < sum(t.nbytes for t in initialised(**shape).to(dtype).state_dict().values())


def test_a_mixture_of_eight_bit_experts_writes_the_same() -> None:  # of int8: fp8 is coarser
    for mixture, prompt in [(scripted("abcdefgh"), "a"), (wide_mixture(), "hello")]:
        sampling = SamplingConfig(max_new_tokens=20, temperature=0.0)
        plain = complete(mixture, BYTES, [prompt], sampling)[0]
        eight = with_narrow_weights(mixture, "int8")
        assert complete(eight, BYTES, [prompt], sampling)[0].text == plain.text
        assert isinstance(eight.expert(0).head, NarrowLinear)


def wide_mixture() -> Mixture:
    return Mixture(small_settings(experts=("only",)), loaders_of([initialised()]), None)
