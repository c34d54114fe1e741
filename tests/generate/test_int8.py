"""Eight-bit weights: how far off they are, and that the text stays the same."""

from typing import Any

import pytest
import torch

from generate.test_writing_text import BYTES, scripted
from mixture.small_mixtures import loaders_of, small_settings
from nn.small_experts import small_expert, text_of
from pyper.config import SparseConfig
from pyper.generate import SamplingConfig, complete, with_int8_weights
from pyper.generate.int8 import Int8Linear, quantize_rows, to_int8
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
    integers, scale = quantize_rows(weight)
    assert integers.abs().max() == 127
    off = (integers * scale[:, None] - weight.float()).abs().amax(dim=1)
    assert (off <= 0.5001 * scale).all()
    assert (integers[2] == 0).all()
    assert integers[3].abs().max() == 127  # a small row loses nothing


def test_a_product_is_that_of_the_widened_weights() -> None:
    linear = torch.nn.Linear(40, 9)
    eight = Int8Linear(linear)
    widened = eight.weight * eight.scale[:, None]
    x = torch.randn(3, 40)
    expected = torch.nn.functional.linear(x, widened, linear.bias)
    torch.testing.assert_close(eight(x), expected)


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
    shape: dict[str, Any], dtype: torch.dtype
) -> None:
    tokens = text_of(8, 40, vocab_size=257)
    expected = initialised(**shape).to(dtype)(tokens).float()
    model = to_int8(initialised(**shape).to(dtype))
    got = model(tokens).float()
    assert 0 < (got - expected).norm() / expected.norm() < 0.03
    assert (got.argmax(-1) == expected.argmax(-1)).float().mean() > 0.95
    n_bytes = sum(t.nbytes for t in model.state_dict().values())
    assert n_bytes < sum(t.nbytes for t in initialised(**shape).to(dtype).state_dict().values())


def test_a_mixture_of_eight_bit_experts_writes_the_same() -> None:
    for mixture, prompt in [(scripted("abcdefgh"), "a"), (wide_mixture(), "hello")]:
        sampling = SamplingConfig(max_new_tokens=20, temperature=0.0)
        plain = complete(mixture, BYTES, [prompt], sampling)[0]
        eight = with_int8_weights(mixture)
        assert complete(eight, BYTES, [prompt], sampling)[0].text == plain.text
        assert isinstance(eight.expert(0).head, Int8Linear)


def wide_mixture() -> Mixture:
    return Mixture(small_settings(experts=("only",)), loaders_of([initialised()]), None)
