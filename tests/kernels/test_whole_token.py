"""All layers for one token as one kernel, against the layers one by one in plain torch."""

import importlib
import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor

from kernels.hopper import run_for_hopper
from kernels.on_triton import DEVICE, error, kernels, needs_triton
from pyper.config import ExpertConfig
from pyper.generate.decode_step import DecodeStep
from pyper.generate.narrow_weights import narrow_model
from pyper.generate.whole_layers import WholeLayers, whole_token_of
from pyper.kernels.whole_token import WholeToken, has_programs
from pyper.nn import PAGE_TOKENS, KVStore, Transformer, init_weights

PAGES = [3, 1, 5, 2]
MOST_TOKENS = PAGE_TOKENS * len(PAGES)
# Nothing before it; one that the next reads; the first of the last page, its past in two parts.
POSITIONS = (0, 47, 48)


def model_of(stored: str = "bf16", **changes: object) -> Transformer:
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
    # Wider models add up more numbers: theirs are smaller, or rounding would grow with the width.
    outputs, inputs = (scale * (32 / model.config.d_model) ** 0.5 for scale in (0.1, 0.2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # gains and biases that are not all one
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            if name.endswith(("out.weight", "down.weight")):  # else zeros at first
                parameter += outputs * torch.randn(parameter.shape, generator=generator)
            if name.endswith("qkv.weight"):  # else all of the past weighs the same
                parameter += inputs * torch.randn(parameter.shape, generator=generator)
    model.to(DEVICE, torch.bfloat16).eval()
    if stored != "bf16":
        narrow_model(model, stored)  # type: ignore[arg-type]
    return model


def store_of(model: Transformer, n_pages: int) -> KVStore:
    return KVStore.allocate(model.config, n_pages, device=model.device, dtype=torch.bfloat16)


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
FEW = [
    ("grouped heads, QK-norm, biases", "bf16", 4),
    ("SwiGLU, odd widths", "int8", 3),  # as many as heads: attention in one part
    ("a layer without positions, ReLU²", "fp8", 4),
]


@contextmanager
def shared_by(n_programs: int, n_numbers: int) -> Iterator[None]:
    """So few programs, with blocks so small that each has several of most weights."""
    module = importlib.import_module("pyper.kernels.whole_token")
    with (
        mock.patch.object(module, "_programs", return_value=n_programs),
        mock.patch.object(module, "_BLOCK_NUMBERS", n_numbers),
    ):
        yield


@needs_triton
@pytest.mark.parametrize(("name", "stored", "n_programs"), FEW)
def test_one_kernel_says_what_all_layers_say(name: str, stored: str, n_programs: int) -> None:
    with shared_by(n_programs, 256):
        compare(model_of(stored, **CASES[name]))


@contextmanager
def alone() -> Iterator[None]:
    """One program, all phases in one launch: it meets nobody, and asks for nothing ahead."""
    kernel = importlib.import_module("pyper.kernels.whole_token_kernel")
    with shared_by(1, 256), ExitStack() as stack:
        for name in ("wait", "ask_for_past", "ask_for_gain"):  # instructions of a GPU
            stack.enter_context(mock.patch.object(kernel, name))
        steps = mock.Mock(return_value=[(-1, 0, 2)])
        stack.enter_context(mock.patch.object(WholeToken, "_one_by_one", steps))
        yield


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="there it is always one launch")
def test_blocks_go_from_phase_to_phase_and_from_layer_to_layer() -> None:
    with alone():
        compare(model_of(n_kv_heads=1))


def test_every_head_of_keys_needs_a_program() -> None:
    with shared_by(4, 256):
        assert has_programs(torch.device(DEVICE), 4)
        assert not has_programs(torch.device(DEVICE), 5)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("stored", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize("name", CASES)
def test_so_it_does_in_blocks_of_the_usual_size(name: str, stored: str) -> None:
    compare(model_of(stored, **CASES[name]))


@torch.no_grad()
def compare(model: Transformer) -> None:
    """What is said after the tokens at POSITIONS, and their keys and values."""
    ours, theirs = store_of(model, 8), store_of(model, 8)
    table = torch.tensor(PAGES, device=DEVICE)
    usual, same = (DecodeStep(model, store, 1, MOST_TOKENS, thin=False) for store in (theirs, ours))
    whole = whole_token_of(model, ours, MOST_TOKENS)
    for position in range(POSITIONS[-1] + 1):
        token = (7 * position + 3) % 50
        expected = usual.run(model, [(token, position, PAGES)])[0]
        if position not in POSITIONS:
            same.run(model, [(token, position, PAGES)])
            continue
        x = model.embedding.weight[token].clone()
        with kernels():
            said = whole(x, table, torch.tensor([position], device=DEVICE)).float()
        assert error(said - said.mean(), expected - expected.mean()) < 0.05
    slots = [PAGE_TOKENS * PAGES[p // PAGE_TOKENS] + p % PAGE_TOKENS for p in POSITIONS]
    for layer, slot in itertools.product(range(model.config.n_layers), slots):
        assert error(ours.keys[layer, slot], theirs.keys[layer, slot]) < 0.05
        assert error(ours.values[layer, slot], theirs.values[layer, slot]) < 0.05


def text_by(model: Transformer, n_tokens: int, *, whole: bool) -> Tensor:
    """Log-probabilities (n_tokens, V) after each token of a text, read by replays of one graph."""
    n_pages = -(-n_tokens // PAGE_TOKENS)
    pages = list(range(n_pages, 0, -1))
    with mock.patch.object(WholeLayers, "pay_for", return_value=whole):
        step = DecodeStep(model, store_of(model, n_pages + 1), 1, n_tokens, thin=True)
    assert isinstance(step._layers, WholeLayers) is whole
    vocabulary = model.config.vocab_size
    rows = [((7 * p + 3) % vocabulary, p, pages) for p in range(n_tokens)]
    return torch.cat([step.run(model, [row]).clone() for row in rows])


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
@pytest.mark.parametrize("stored", ["bf16", "int8", "fp8"])
@torch.no_grad()
def test_many_replays_in_a_row_say_what_thin_layers_say(stored: str) -> None:
    shape = {"vocab_size": 2048, "seq_len": 512, "d_model": 512, "n_heads": 8, "d_ff": 2048}
    model = model_of(stored, n_layers=4, n_kv_heads=4, **shape)
    expected = text_by(model, 400, whole=False)
    got = text_by(model, 400, whole=True)
    # Each token by itself: one that is wrong shows.
    for ours, theirs in zip(got, expected, strict=True):
        assert error(ours - ours.mean(), theirs - theirs.mean()) < 0.05
    # Who meets too early would read now this, now that.
    for _ in range(3):
        assert torch.equal(text_by(model, 400, whole=True), got)


BUILD = """
import importlib
import sys
from unittest import mock

import torch

from kernels.hopper import build, spilled_bytes
from pyper.kernels.thin_linear import ThinWeight

module = importlib.import_module("pyper.kernels.whole_token")
stored = getattr(torch, sys.argv[1])
narrow = stored != torch.bfloat16

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, device="meta", dtype=dtype)

def weight(*shape):
    scale = empty(shape[0], dtype=torch.float32) if narrow else None
    return ThinWeight(empty(*shape, dtype=stored), scale, None)

D, F, V, H, K, PAGE = 2048, 8192, 32768, 16, 128, 16
gain, turn, past = empty(D), empty(512, K, dtype=torch.float32), empty(512, H, K)
layer = module.TokenLayer(
    gain, weight(3 * D, D), None, turn, turn, past, past, weight(D, D), gain,
    weight(F, D), weight(D, F),
)
shape = module.TokenShape(H, H, K, F, "gelu", 1e-5, PAGE)
with mock.patch.object(module, "_programs", return_value=264):
    token = module.WholeToken([layer], gain, weight(V, D), shape)
constants = token._constants() | {"PHASE": -1, "HARDWARE": True, "head_bias_ptr": None}
if not narrow:
    constants["head_scale_ptr"] = None

types = {"table_ptr": "*i64", "pages_ptr": "*i64", "position_ptr": "*i64"}
types |= {"part_ptr": "*fp32", "log_sum_ptr": "*fp32", "head_scale_ptr": "*fp32"}
types |= {"tickets_ptr": "*i32", "counter_ptr": "*i32", "head_ptr": "*i32"}
types |= {"first_layer": "i32", "last_layer": "i32", "eps": "fp32"}
options = {"num_warps": module._WARPS, "num_stages": 1, "launch_cooperative_grid": True}
built = build(module.whole_token_kernel, types, constants, **options)
assert built.metadata.shared < module.SHARED_BYTES
ptx = built.asm["ptx"]
assert "ld.global.v4" in ptx
assert "ld.acquire.gpu" in ptx
assert "atom.global.gpu.release" in ptx or "red.global.gpu.release" in ptx
assert (sys.argv[1] != "int8") or "dp2a" in ptx
print(*spilled_bytes(ptx))
"""


# With int8 a few words of a thread are put aside, once or twice a layer.
SPILLED_BYTES = {"bfloat16": 0, "int8": 64}


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("stored", SPILLED_BYTES)
def test_a_large_expert_fits_the_registers_of_a_large_gpu(stored: str) -> None:
    spills = run_for_hopper(BUILD, stored).split()
    assert len(spills) == 2
    assert max(map(int, spills)) <= SPILLED_BYTES[stored]
