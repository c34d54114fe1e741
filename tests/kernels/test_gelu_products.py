"""Products around GELU with GELU inside: emulated, against float64, and where they are used."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from kernels.gluon_emulated import emulated, run
from kernels.gluon_values import Pointer, Tiles
from kernels.naive_layer import random_products, random_weights
from kernels.on_triton import (
    DEVICE,
    error,
    kernels,
    leaf,
    limit,
    needs_emulation,
    needs_triton,
    poisoned,
    random,
    random_index,
)
from pyper.kernels import (
    dense_feed_forward,
    expert_choice,
    expert_choice_layer,
    feed_forward,
    gluon_support,
    launch,
)
from pyper.kernels import gelu_products as products

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


@needs_triton
@needs_emulation
@pytest.mark.parametrize("gated", [True, False])
def test_both_directions_match_float64(gated: bool) -> None:
    rows, dy, up, down, *around = random_products(2, 256, 1024, 512).values()
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
    rows, dy, up, down, gates, index = random_products(1, 128, 512, 256).values()
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
