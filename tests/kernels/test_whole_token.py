"""All layers for one token as one kernel, against the layers one by one in plain torch."""

import pytest
import torch
from torch import Tensor

from kernels.on_triton import DEVICE, kernels, needs_triton
from pyper.config import ExpertConfig
from pyper.generate.decode_step import DecodeStep
from pyper.generate.narrow_weights import narrow_model
from pyper.generate.whole_layers import whole_token_of
from pyper.nn import PAGE_TOKENS, KVStore, Transformer, init_weights

N_PAGES = 8


def model_of(**changes: object) -> Transformer:
    shape: dict[str, object] = {
        "vocab_size": 50,
        "seq_len": 128,
        "bos_id": 0,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 2,
        "d_ff": 96,
    }
    model = Transformer(ExpertConfig(**shape | changes))  # type: ignore[arg-type]
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # gains and biases that are not all one
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            if name.endswith(("out.weight", "down.weight")):  # else zeros at first
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.to(DEVICE, torch.bfloat16).eval()


CASES: dict[str, dict[str, object]] = {
    "plain": {},
    "grouped heads, QK-norm, biases": {
        "n_heads": 4,
        "n_kv_heads": 2,
        "qk_norm": True,
        "attention_bias": True,
        "feed_forward_bias": True,
    },
    "SwiGLU, odd widths": {"activation": "swiglu", "d_ff": 88, "d_model": 48, "n_heads": 3},
    "a layer without positions, ReLU²": {"activation": "relu2", "no_rope_layers": (1,)},
}


@needs_triton
@pytest.mark.parametrize("stored", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_one_kernel_says_what_all_layers_say(name: str, stored: str) -> None:
    model = model_of(**CASES[name])
    if stored != "bf16":
        narrow_model(model, stored)  # type: ignore[arg-type]
    ours, theirs = (
        KVStore.allocate(model.config, N_PAGES, device=model.device, dtype=torch.bfloat16)
        for _ in range(2)
    )
    pages = [3, 1, 5, 2]
    table = torch.tensor(pages, device=DEVICE)
    usual, same = (DecodeStep(model, store, 1, 128, thin=False) for store in (theirs, ours))
    with kernels():
        whole = whole_token_of(model, ours, 128)
        for position in range(36):
            token = (7 * position + 3) % 50
            expected = usual.run(model, [(token, position, pages)])[0]
            if 2 < position < 33:  # read as usual: attention in several parts needs some past
                same.run(model, [(token, position, pages)])
                continue
            x = model.embedding.weight[token].clone()
            said = whole(x, table, torch.tensor([position], device=DEVICE)).float()
            torch.testing.assert_close(said.log_softmax(dim=-1), expected, rtol=0.05, atol=0.08)
    slot = PAGE_TOKENS * pages[2] + 35 - 2 * PAGE_TOKENS
    close(ours.keys[:, slot], theirs.keys[:, slot])
    close(ours.values[:, slot], theirs.values[:, slot])


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
