"""Kernels in Triton's lower language where there is no GPU: threads stand in for groups of warps.

What runs by itself on a GPU happens here as late or as oddly as it may: products read their
operands when someone waits for them, stores when someone waits for their reading, and copies land
after a while, on a place that was NaN until then. A missing wait shows as a wrong number or as a
deadlock, which ends after a minute. What single threads of a group do is left to the compiler.
"""

import itertools
import random
import re
import threading
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.gluon_values import Barrier, Pointer, Shared, Tiles, Value, raw, state

BYTES = {torch.bfloat16: 2, torch.int32: 4}


def _init(bar: Barrier, count: int) -> None:
    bar.count = bar.missing = count


def _fetch(
    tiles: Tiles, at: Sequence[int], bar: Barrier, target: Shared, pred: bool = True
) -> None:
    if not pred:
        return
    target.data.fill_(float("nan") if target.data.is_floating_point() else -1)
    found = tiles.tile(at)

    def land() -> None:
        time.sleep(random.random() * 2e-3)
        target.data.copy_(found)
        bar.came(found.numel() * BYTES[found.dtype])

    threading.Thread(target=land).start()


def _send(tiles: Tiles, at: Sequence[int], source: Shared) -> None:
    state.stores.append((tiles.tile(at), source.data))


def _store_wait(pending: int) -> None:
    while len(state.stores) > pending:
        target, source = state.stores.pop(0)
        target.copy_(source)


def _mma(a: Shared, b: Shared, acc: Value, is_async: bool, use_acc: bool = True) -> Value:
    out = Value(torch.full_like(acc.data, float("nan")))

    def run() -> None:
        product = a.data.float() @ b.data.float()
        out.data.copy_(acc.data + product if use_acc else product)

    state.products.append(run)
    return out


def _mma_wait(pending: int, deps: list[Value]) -> Value:
    while len(state.products) > pending:
        state.products.pop(0)()
    return deps[0]


def _copy_later(target: Shared, source: Pointer) -> None:
    """Reads at once, writes as late as it may."""
    target.data.fill_(float("nan"))
    state.copies.append((target.data, source.data.flatten()[source.at]))


def _commit() -> None:
    state.groups.append(state.copies)
    state.copies = []


def _wait_group(pending: int) -> None:
    while len(state.groups) > pending:
        for target, found in state.groups.pop(0):
            target.copy_(found)


def _assembly(text: str, _: str, given: list[Value], *rest: Any) -> Value:
    assert text.startswith("cvt.rn.bf16x2")
    low, high = (x.data.to(torch.bfloat16).view(torch.int16).to(torch.int32) for x in given)
    return Value((high << 16) | (low & 0xFFFF))


def _specialize(parts: list[tuple[Any, tuple[Any, ...]]], *rest: Any) -> None:
    failed: list[BaseException] = []
    where = (state.program, state.programs)

    def run(function: Any, given: tuple[Any, ...]) -> None:
        _enter(*where)
        try:
            function(*given)
            assert not state.products
            assert not state.stores
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=part) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def _enter(program: tuple[int, ...], programs: tuple[int, ...]) -> None:
    state.program, state.programs = program, programs
    state.products, state.stores, state.copies, state.groups = [], [], [], []


def _allocate(dtype: Any, shape: list[int], layout: Any) -> Shared:
    if dtype == torch.int64:  # barriers
        return Shared([Barrier() for _ in range(shape[0])])
    return Shared(torch.zeros(shape, dtype=dtype))


def _language() -> types.SimpleNamespace:
    def of(function: Callable[..., Tensor]) -> Callable[..., Value]:
        return lambda *given, **named: Value(function(*map(raw, given), **named))

    def split(x: Value) -> tuple[Value, Value]:
        return Value(x.data[..., 0]), Value(x.data[..., 1])

    def load(pointer: Pointer, mask: Value | None = None, other: float = 0.0, **_: Any) -> Value:
        at = torch.as_tensor(pointer.at)
        there = torch.ones_like(at, dtype=torch.bool) if mask is None else mask.data
        found = pointer.data.flatten()[at.where(there, 0)]
        return Value(found.where(there, torch.tensor(other, dtype=found.dtype)))

    def store(pointer: Pointer, value: Any, mask: Value | None = None) -> None:
        at, given = torch.as_tensor(pointer.at), torch.as_tensor(raw(value))
        there = torch.ones_like(at, dtype=torch.bool) if mask is None else mask.data
        pointer.data.view(-1)[at[there]] = given.expand(at.shape)[there].to(pointer.data.dtype)

    def atomic_add(pointer: Pointer, value: int, sem: str) -> int:
        before = int(pointer.data.view(-1)[pointer.at])
        pointer.data.view(-1)[pointer.at] += value
        return before

    def maximum(x: Any, y: float) -> Value:
        return Value(raw(x).clamp(min=y))

    def where(condition: Any, x: Any, y: Any) -> Any:
        if isinstance(condition, Value):
            return Value(torch.where(condition.data, raw(x), raw(y)))
        return x if condition else y

    def minimum(x: Any, y: Any) -> Any:
        return Value(x.data.clamp(max=y)) if isinstance(x, Value) else min(x, y)

    return types.SimpleNamespace(
        bfloat16=torch.bfloat16,
        float32=torch.float32,
        int32=torch.int32,
        int64=torch.int64,
        constexpr=lambda x: x,
        program_id=lambda axis: state.program[axis],
        num_programs=lambda axis: state.programs[axis],
        static_range=range,
        arange=lambda low, high, layout: Value(torch.arange(low, high)),
        zeros=lambda shape, dtype, layout: Value(torch.zeros(shape, dtype=dtype)),
        reshape=of(torch.reshape),
        permute=of(torch.permute),
        abs=of(torch.abs),
        exp2=of(torch.exp2),
        rsqrt=of(torch.rsqrt),
        thread_barrier=lambda: None,
        sum=lambda x, axis: Value(x.data.sum(axis)),
        convert_layout=lambda x, layout, **named: x,
        **{f.__name__: f for f in (split, load, store, atomic_add, where, maximum, minimum)},
        inline_asm_elementwise=_assembly,
        allocate_shared_memory=_allocate,
        warp_specialize=_specialize,
        NVMMASharedLayout=lambda *given: None,
        NVMMADistributedLayout=lambda *given: None,
        SliceLayout=lambda *given: None,
        BlockedLayout=lambda *given: None,
        DistributedLinearLayout=lambda **given: None,
    )


def _jit(function: Any = None, **options: Any) -> Any:
    return function or (lambda f: f)


def emulated(*files: Path) -> dict[str, Any]:
    """The names that `files` define, their kernels as functions of the values above."""
    gluon = types.SimpleNamespace(jit=_jit, constexpr_function=lambda f: f)
    barriers = types.SimpleNamespace(
        init=_init,
        wait=Barrier.wait,
        expect=lambda bar, size, pred=True: bar.arrive(1, size) if pred else None,
        arrive=lambda bar, pred=True: bar.arrive() if pred else None,
        MBarrierLayout=lambda: None,
    )
    copies = types.SimpleNamespace(
        async_copy_global_to_shared=_fetch,
        async_copy_shared_to_global=_send,
        store_wait=_store_wait,
    )
    later = types.SimpleNamespace(
        async_copy_global_to_shared=_copy_later, commit_group=_commit, wait_group=_wait_group
    )
    names = {"gluon": gluon, "gl": _language(), "mbarrier": barriers, "tma": copies}
    names |= {"async_copy": later, "gdc_launch_dependents": lambda: None}
    names |= {"warpgroup_mma": _mma, "warpgroup_mma_wait": _mma_wait}
    names |= {"fence_async_shared": lambda: None, "TensorDescriptor": None}
    names |= {"_normal_tail": _normal_tail, "__name__": __name__}
    # their own imports, less those of the language and of each other
    imports = re.compile(r"^from (triton|pyper)\S* import (\([^)]*\)|.*)$", flags=re.M)
    for file in files:
        exec(compile(imports.sub("", file.read_text()), str(file), "exec"), names)
    return names


def run(
    kernel: Callable[..., None], programs: tuple[int, ...], *given: Any, **constants: Any
) -> None:
    """One program after the other."""
    for program in itertools.product(*map(range, programs)):
        _enter(program, programs)
        kernel(*given, **constants)
        assert not state.products


def _normal_tail(x: Value) -> tuple[Value, Value]:
    size = x.data.abs()
    return Value(torch.special.ndtr(-size)), Value((-size * size / 2).exp())
