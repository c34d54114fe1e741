"""Attention of decoding: one new token of each text against its past, in pages and in one piece.

    python benchmarks/paged_attention.py [--json FILE] [--batches 1 8 64] [--contexts 512 2048 8192]

Microseconds of a layer of `8x1b5` (16 heads of 128, bf16), and the share of what the card copies a
second; RoPE and the new token's place in the cache included. The peer is torch's attention, which
gets the past in one piece and does neither. Caches are read cold. `--sweep` tries other blocks.
Without a GPU: a tiny shape, to see that it runs.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from _record import add_json_option, write_record
from _timing import as_graph, copied_bytes_per_second, median_ms
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pyper.kernels import Turn, paged_attention, paged_attention_torch
from pyper.nn import PAGE_TOKENS

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
HEADS, K = (16, 128) if GPU else (2, 16)
COLD_BYTES = 200_000_000 if GPU else 1
SWEEP = ((1, 2, 4, 8, 16), (32, 64, 128), (3, 5, 7), (4, 8), (1, 2, 4))
"""Parts of a text and head, tokens of a block, stages, warps, heads of a program. Stages beyond the
first are pairs: pages are asked for before what lies in them."""
Cache = tuple[Tensor, Tensor]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def microseconds(function: Callable[[Cache], Tensor], caches: list[Cache]) -> float:
    def step(_: int) -> None:
        for cache in caches:
            function(cache)

    return 1e3 * median_ms(as_graph(step) if GPU else step, repeats=10) / len(caches)


def in_pages(batch: int, context: int) -> tuple[Callable[..., Tensor], list[Cache], int]:
    """Ours, or its twin, of a cache; as many caches as hold COLD_BYTES; bytes read of one."""
    n_pages = context // PAGE_TOKENS + 1
    nbytes = 4 * batch * context * HEADS * K
    slots = batch * n_pages * PAGE_TOKENS, HEADS, K
    caches = [(draw(*slots), draw(*slots)) for _ in range(COLD_BYTES // nbytes + 1)]
    pages = torch.randperm(batch * n_pages, device=DEVICE).view(batch, n_pages)
    positions = torch.full((batch,), context, device=DEVICE)
    angles = torch.rand(context + 1, K // 2, device=DEVICE)
    sin = angles.sin()
    turn = Turn(torch.cat([angles.cos()] * 2, 1), torch.cat([-sin, sin], 1))
    rows = draw(batch, 3 * HEADS * K).unflatten(1, (3, HEADS, K)).unbind(1)
    tickets = torch.zeros(batch * HEADS, dtype=torch.int32, device=DEVICE)

    def run(cache: Cache, *, twin: bool = False) -> Tensor:
        given = (*rows, *cache, pages, positions, PAGE_TOKENS, turn)
        if twin:
            return paged_attention_torch(*given)
        return paged_attention(*given, tickets=tickets, overlap=True)

    return run, caches, nbytes


def in_one_piece(batch: int, context: int, n: int) -> float:
    query = draw(batch, HEADS, 1, K)
    shape = batch, HEADS, context, K
    caches = [(draw(*shape), draw(*shape)) for _ in range(n)]
    return microseconds(lambda c: F.scaled_dot_product_attention(query, *c), caches)


def check(run: Callable[..., Tensor], cache: Cache) -> None:
    ours, expected = run(cache).float(), run(cache, twin=True).float()
    off = ((ours - expected).norm() / expected.norm()).item()
    assert off < 0.02, f"the kernel is off by {off:.2%}"


def sweep(run: Callable[..., Tensor], caches: list[Cache], batch: int) -> list[Any]:
    """Microseconds in every block shape that builds and is right, best first."""
    module, found = sys.modules[paged_attention.__module__], []
    for parts, tokens, stages, warps, heads in itertools.product(*SWEEP):
        too_many = GPU and not 128 <= parts * batch * HEADS // heads <= 2048  # programs, or too few
        if too_many or tokens * (stages // 2) > 192:
            continue
        shape = module.Parts(parts, tokens, stages, warps, 1, heads)
        with mock.patch.object(module, "_parts", return_value=shape):
            try:
                check(run, caches[0])
                found.append((round(microseconds(run, caches), 1), tuple(shape)))
            except Exception as error:  # too much shared memory
                print(shape, repr(error)[:80])
    return sorted(found)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64] if GPU else [2])
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=[512, 2048, 8192] if GPU else [9]
    )
    parser.add_argument("--sweep", action="store_true")
    add_json_option(parser)
    args, console, results = parser.parse_args(), Console(width=120), {}
    bandwidth = copied_bytes_per_second()
    table = Table("batch", "context", "torch, one piece", "Pyper", "share", title="µs of a layer")
    for batch, context in itertools.product(args.batches, args.contexts):
        run, caches, nbytes = in_pages(batch, context)
        check(run, caches[0])
        ours, peer = microseconds(run, caches), in_one_piece(batch, context, len(caches))
        share = nbytes / (ours / 1e6) / bandwidth
        row = {"ours": ours, "torch": peer, "share": share}
        if args.sweep:
            row["sweep"] = sweep(run, caches, batch)
            console.print(batch, context, f"{ours:.1f}", row["sweep"][:4])
        results[f"{batch} {context}"] = row
        table.add_row(str(batch), str(context), f"{peer:.1f}", f"{ours:.1f}", f"{share:.2f}")
        write_record(args.json, {"bytes_per_second": bandwidth, "rows": results})
        del run, caches
    console.print(table)


if __name__ == "__main__":
    main()
