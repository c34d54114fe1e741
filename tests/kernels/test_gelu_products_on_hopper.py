"""Products around GELU with GELU inside on the GPU they are for: built for it, and run on it."""

import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from kernels.hopper import is_tried_triton, needs_hopper, run_for_hopper
from kernels.naive_layer import random_products, random_weights
from kernels.on_triton import error, leaf, limit, needs_triton, random
from pyper.config.expert import Activation
from pyper.kernels import dense_feed_forward, expert_choice, expert_choice_layer, feed_forward
from pyper.kernels import gelu_products as products
from pyper.kernels.activation import activation_forward, activation_gradients

BF16 = torch.bfloat16
BUILD = """
from kernels.hopper import build, spilled_bytes
from pyper.kernels import gelu_products_kernel as kernels, gelu_slices_kernel as slices

def described(kind, shape, layout):
    return f"tensordesc<{kind}[{shape[0]}, {shape[1]}],{layout!r}>"

def built_of(E, back, gated, again):
    kernel, tiles = kernels.product, kernels.TILE_LAYOUT
    constants = dict(E=E, D=2048, F=8192, BACK=back, GATED=gated, AGAIN=again)
    absent = [] if again else ["again_tiles"]
    absent += [] if back and gated else ["parts_ptr"]
    absent += [] if gated else ["gates_ptr", "index_ptr"]
    constants |= dict.fromkeys(absent)
    weight = described("bf16", (64, 256) if back else (256, 64), tiles)
    types = {"a_tiles": described("bf16", (64, 64), tiles), "b_tiles": weight}
    types |= {"C": "i32", "index_ptr": "*i64"}
    words, names = described("i32", (64, 16), slices.WORDS_LAYOUT), kernel.arg_names
    types |= {n: words for n in names if n.endswith("tiles") and n not in types}
    whole, options = ["C"], {"gluon": True, "num_warps": 4}
    return build(kernel, types, constants, default="*fp32", whole=whole, **options)

FORWARD = [(8, False, True, False), (1, False, False, False)]
BACKWARD = [(8, True, True, False), (8, True, True, True), (1, True, False, True),
            (1, True, False, False)]
for case in FORWARD + BACKWARD:
    built = built_of(*case)
    assert built.metadata.shared <= 227 * 1024
    for part in ("wgmma.mma_async", "cp.async.bulk.tensor", "setmaxnreg"):
        assert part in built.asm["ptx"], part
    assert spilled_bytes(built.asm["ptx"]) == [0, 0], case
"""


@needs_triton
@pytest.mark.skipif(not is_tried_triton(), reason="Gluon is another one in this Triton")
@pytest.mark.slow
def test_all_variants_build_for_a_large_gpu_and_spill_nothing() -> None:
    run_for_hopper(BUILD)


@needs_triton
@needs_hopper
@pytest.mark.parametrize(
    ("E", "C", "gated"), [(8, 4096, True), (8, 1152, True), (1, 16_384, False)]
)
def test_at_real_shapes_it_does_what_separate_passes_do(E: int, C: int, gated: bool) -> None:
    rows, dy, up, down, *around = random_products(E, C, 2048, 8192).values()
    gates, index = around if gated else (None, None)
    pre, hidden = products.up_gelu(rows, up, gates, index)
    assert error(pre, torch.bmm(rows, up.mT)) < 1e-3
    assert error(hidden, activation_forward(pre, "gelu", index, gates)) < 1e-3
    dhidden = torch.bmm(dy, down)
    for want_hidden in (True, False):
        got = products.down_gradient_gelu(dy, down, pre, gates, index, want_hidden)
        expected = activation_gradients(dhidden, pre, "gelu", index, gates, want_hidden)
        for ours, theirs in zip(got, expected, strict=True):
            assert error(ours, theirs) < 1e-3
        assert not want_hidden or torch.equal(got[2], hidden)


@needs_triton
@needs_hopper
@pytest.mark.parametrize("recompute", [False, True])
def test_layers_on_it_are_the_usual_ones(recompute: bool) -> None:
    w = random_weights(8192, 1024, 4096, 8, dtype=BF16).leaves()
    given, dout = (w.x, w.residual, w.router, w.up, w.down), random(8192, 1024, seed=8, dtype=BF16)
    one = (w.x, leaf(w.up[0]), leaf(w.down[0]))

    def both() -> list[Tensor]:
        sparse = expert_choice_layer(*given, 1024, recompute=recompute).out
        dense = dense_feed_forward(*one)
        grads = [torch.autograd.grad(out, of, dout) for out, of in ((sparse, given), (dense, one))]
        return [sparse, dense, *grads[0], *grads[1]]

    with mock.patch.object(products, "_launch", wraps=products._launch) as launched:
        got = both()
        assert launched.call_count == 4
    never = mock.Mock(return_value=False)
    with mock.patch.object(expert_choice, "fits", never):  # noqa: SIM117
        with mock.patch.object(feed_forward, "fits", never):
            usual = both()
    assert all(error(a, b) < limit(BF16) for a, b in zip(got, usual, strict=True))


@needs_triton
@needs_hopper
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match")
def test_a_cuda_graph_replays_it_on_new_inputs() -> None:
    activation: Activation = "gelu"
    x, up = random(8192, 1024, dtype=BF16), random(4096, 1024, seed=1, dtype=BF16) / 32
    given = [leaf(x), leaf(up), leaf(up.mT.contiguous())]

    def step() -> list[Tensor]:
        out = dense_feed_forward(*given, activation)
        return [out, *torch.autograd.grad(out.float().square().sum(), given)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    with torch.no_grad():
        given[0].copy_(random(8192, 1024, seed=77, dtype=BF16))
    graph.replay()
    for ours, theirs in zip(recorded, step(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there it measures")
def test_without_a_gpu_the_comparison_says_that_there_is_nothing_to_do() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "fused_products.py"
    command = [sys.executable, str(script)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "nothing to do" in printed
