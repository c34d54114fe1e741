"""Products around GELU with GELU inside: against float64, and built for the GPU they are for."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from kernels.gluon_emulated import Pointer, Tiles, emulated, run
from kernels.hopper import run_for_hopper
from kernels.naive_layer import random_weights
from kernels.on_triton import (
    DEVICE,
    error,
    kernels,
    leaf,
    limit,
    needs_triton,
    poisoned,
    random,
    random_index,
)
from pyper.config.expert import Activation
from pyper.kernels import (
    dense_feed_forward,
    expert_choice,
    expert_choice_layer,
    feed_forward,
    gluon_support,
    launch,
)
from pyper.kernels import gelu_products as products
from pyper.kernels.activation import activation_forward, activation_gradients

BF16 = torch.bfloat16
KERNELS = [
    Path(products.__file__).with_name(f"{name}_kernel.py")
    for name in ("gelu_slices", "gelu_products")
]


def launched_in_emulation(
    a: tuple[Tensor, tuple[int, int]],
    b: tuple[Tensor, tuple[int, int]],
    words: tuple[Tensor | None, ...],
    parts: Tensor | None,
    gates: Tensor | None,
    index: Tensor | None,
    backward: bool,
) -> None:
    """Instead of `_launch`: five programs share the tiles; some have two, some one, some none."""
    (E, C, D), d_ff = a[0].shape, words[0].shape[2]  # type: ignore[union-attr]
    tiles = [Tiles(x.flatten(0, 1), block) for x, block in (a, b)]
    tiles += [
        None if x is None else Tiles(x.view(torch.int32).flatten(0, 1), (64, 16)) for x in words
    ]
    around = [None if x is None else Pointer(x) for x in (parts, gates, index)]
    constants = {"E": E, "D": D, "F": d_ff, "BACK": backward}
    constants |= {"GATED": gates is not None, "AGAIN": words[2] is not None}
    run(emulated(*KERNELS)["product"], (5,), *tiles, *around, C, **constants)


@contextmanager
def emulation() -> Iterator[None]:
    """The layers take this kernel wherever its tiles are whole, emulated."""

    def whole(rows: Tensor, up: Tensor, *rest: object) -> bool:
        return rows.shape[1] % 128 == 0

    with (
        kernels(),
        poisoned(),
        mock.patch.object(products, "_launch", launched_in_emulation),
        mock.patch.object(expert_choice, "fits", whole),
        mock.patch.object(feed_forward, "fits", whole),
    ):
        yield


needs_emulation = pytest.mark.skipif(DEVICE != "cpu", reason="there the kernel itself runs")


def inputs(E: int, C: int, D: int, d_ff: int) -> dict[str, Tensor]:
    return {
        "rows": random(E, C, D, seed=0, dtype=BF16),
        "dy": random(E, C, D, seed=1, dtype=BF16),
        "up": random(E, d_ff, D, seed=2, dtype=BF16) / D**0.5,
        "down": random(E, D, d_ff, seed=3, dtype=BF16) / D**0.5,
        "gates": random(C + 44, E, seed=4).softmax(-1),
        "index": random_index(C + 44, E, C),
    }


@needs_triton
@needs_emulation
@pytest.mark.parametrize("gated", [True, False])
def test_both_directions_match_float64(gated: bool) -> None:
    rows, dy, up, down, *around = inputs(2, 256, 1024, 512).values()
    gates, index = around if gated else (None, None)
    with emulation():
        pre, hidden = products.up_gelu(rows, up, gates, index)
        dpre, dgates, nothing = products.down_gradient_gelu(dy, down, pre, gates, index, False)
        *same, again = products.down_gradient_gelu(dy, down, pre, gates, index, True)

    exact_gates = torch.ones(300, 2).double() if gates is None else leaf(gates, torch.float64)
    gate = exact_gates.T.gather(1, around[1]).unsqueeze(-1)
    x = leaf(pre, torch.float64)
    expected = torch.nn.functional.gelu(x) * gate
    expected.backward(dy.double() @ down.double())
    assert error(pre, rows.double() @ up.double().mT) < limit(BF16)
    assert error(hidden, expected) < limit(BF16)
    assert error(dpre, x.grad) < limit(BF16)
    assert nothing.numel() == 0
    assert torch.equal(again, hidden)
    assert torch.equal(same[0], dpre)
    assert torch.equal(same[1], dgates)
    if gated:
        assert error(dgates, exact_gates.grad) < limit(BF16)
    else:
        assert dgates.numel() == 0


@needs_triton
@needs_emulation
@pytest.mark.parametrize("recompute", [False, True])
def test_the_sparse_layer_is_the_same_with_it(recompute: bool) -> None:
    w = random_weights(300, 512, 256, 2, dtype=BF16).leaves()
    given = (w.x, w.residual, w.router, w.up, w.down)

    def layer() -> list[Tensor]:
        out = expert_choice_layer(*given, 128, recompute=recompute).out
        return [out, *torch.autograd.grad(out, given, random(300, 512, seed=8, dtype=BF16))]

    with kernels():
        usual = layer()
    with emulation():
        got = layer()
    assert all(error(a, b) < 2 * limit(BF16) for a, b in zip(got, usual, strict=True))


@needs_triton
@needs_emulation
@pytest.mark.parametrize("frozen", [False, True])
def test_the_dense_layer_is_the_same_with_it(frozen: bool) -> None:
    x, up = random(2, 64, 512, dtype=BF16), random(256, 512, seed=1, dtype=BF16) / 16
    down, bias = random(512, 256, seed=2, dtype=BF16) / 16, random(512, seed=3, dtype=BF16)
    given = [leaf(part) for part in (x, up, down, bias)]
    if frozen:
        down.requires_grad_(False)

    def layer() -> list[Tensor]:
        out = dense_feed_forward(*given[:2], down if frozen else given[2], down_bias=given[3])
        wanted = given[:2] if frozen else given
        return [out, *torch.autograd.grad(out, wanted, random(2, 64, 512, seed=8, dtype=BF16))]

    with kernels():
        usual = layer()
    with emulation():
        got = layer()
    assert all(error(a, b) < 2 * limit(BF16) for a, b in zip(got, usual, strict=True))


@needs_triton
@needs_emulation
def test_what_compilers_are_told_is_true() -> None:
    rows, dy, up, down, gates, index = inputs(1, 128, 512, 256).values()
    pre = random(1, 128, 256, dtype=BF16)
    with emulation():
        torch.library.opcheck(products.up_gelu, (rows, up, gates, index))
        torch.library.opcheck(products.down_gradient_gelu, (dy, down, pre, gates, index, True))
        torch.library.opcheck(products.down_gradient_gelu, (dy, down, pre, None, None, False))


@needs_triton
@needs_emulation
def test_a_layer_compiles_without_a_break() -> None:
    x, up = random(128, 512, dtype=BF16), random(256, 512, seed=1, dtype=BF16) / 16
    given = [leaf(x), leaf(up), leaf(up.mT.contiguous())]
    compiled = torch.compile(dense_feed_forward, fullgraph=True, backend="aot_eager")
    results = []
    with emulation():
        for layer in (dense_feed_forward, compiled):
            out = layer(*given)
            results.append([out, *torch.autograd.grad(out.float().square().sum(), given)])
    torch.compiler.reset()
    assert all(error(a, b) < 1e-6 for a, b in zip(*results, strict=True))


def test_the_compiler_asks_for_the_device_once() -> None:
    def asked(x: Tensor) -> Tensor:
        return x + 1 if gluon_support.is_tried(0) else x

    with mock.patch.object(gluon_support, "processors", return_value=132) as processors:
        compiled = torch.compile(asked, fullgraph=True, backend="eager")
        results = [compiled(torch.zeros(1)).item() for _ in range(3)]
    torch.compiler.reset()
    assert results == [float(launch.HAS_TRITON)] * 3
    assert processors.call_count <= 1


@needs_triton
def test_parts_of_gates_gradients_are_added_up_in_their_places() -> None:
    parts, index = random(5, 3, 40), random_index(50, 3, 40)
    got = torch.zeros(50, 3, device=DEVICE)
    with kernels():
        products._add_up(parts, index, got)
    expected = torch.zeros(3, 50, device=DEVICE, dtype=torch.float64)
    expected.scatter_(1, index, parts.double().sum(0))
    assert error(got, expected.T) < 1e-6


class Described:
    """A tensor's properties, on a GPU that need not be here."""

    is_cuda, device = True, mock.Mock(index=0)

    def __init__(self, *shape: int, dtype: torch.dtype = BF16, dense: bool = True) -> None:
        self.shape, self.dtype, self.dense = shape, dtype, dense

    def is_contiguous(self) -> bool:
        return self.dense


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"E": 1, "C": 16_384}, True),
        ({"E": 1, "C": 1024}, False),  # too few tiles for all multiprocessors
        ({"C": 4000}, False),
        ({"d_ff": 8000}, False),
        ({"D": 1920}, False),
        ({"D": 512}, False),
        ({"activation": "gelu_tanh"}, False),
        ({"activation": "swiglu"}, False),
        ({"bias": Described(8, 8192)}, False),
        ({"dtype": torch.float32}, False),
        ({"dense": False}, False),
        ({"tried": False}, False),
    ],
)
def test_it_is_used_where_it_was_measured(change: dict[str, object], taken: bool) -> None:
    case = {"E": 8, "C": 4096, "D": 2048, "d_ff": 8192, "activation": "gelu", "bias": None}
    case |= {"dtype": BF16, "dense": True, "tried": True} | change
    E, C, D, d_ff, activation, bias, dtype, dense, tried = case.values()
    rows, down = Described(E, C, D), Described(E, D, d_ff)
    up = Described(E, d_ff, D, dtype=dtype, dense=dense)
    with mock.patch.object(products, "is_tried", return_value=tried):
        assert products.fits(rows, up, down, activation, bias) == taken


def test_a_cpu_does_not_take_it() -> None:
    shapes = ((8, 4096, 1024), (8, 1024, 1024), (8, 1024, 1024))
    given = [torch.empty(0, dtype=BF16).new_empty(shape, device="meta") for shape in shapes]
    assert not products.fits(*given, "gelu", None)


def is_tried_triton() -> bool:
    """Whether the kernels were written for this version, and are used with it."""
    return launch.HAS_TRITON and version("triton").startswith("3.6.")


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


def on_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


needs_hopper = pytest.mark.skipif(not on_hopper(), reason="there is no Hopper GPU")


@needs_triton
@needs_hopper
@pytest.mark.parametrize(
    ("E", "C", "gated"), [(8, 4096, True), (8, 1152, True), (1, 16_384, False)]
)
def test_at_real_shapes_it_does_what_separate_passes_do(E: int, C: int, gated: bool) -> None:
    rows, dy, up, down, *around = inputs(E, C, 2048, 8192).values()
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
