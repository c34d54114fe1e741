"""On a GPU: recorded and compiled steps write what a CPU writes."""

from typing import Any

import pytest
import torch

from generate.test_batch_engine import ask
from generate.test_writing_text import BYTES
from kernels.test_gpu import no_waiting
from mixture.small_mixtures import MODES, loaders_of, small_experts, small_router, small_settings
from nn.small_experts import small_expert, text_of
from pyper.generate import BatchEngine, EngineLimits, Narrow, SamplingConfig, with_narrow_weights
from pyper.generate.decode_step import DecodeStep
from pyper.mixture import Mixture
from pyper.nn import KVCache

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
SHAPE: dict[str, Any] = {"vocab_size": 257, "d_model": 64, "n_heads": 4, "d_ff": 128}


def mixture_on(device: str, **mode: Any) -> Mixture:
    experts = [model.to(device) for model in small_experts(**SHAPE)]
    return Mixture(small_settings(**mode), loaders_of(experts), small_router("unigram", 4, 257))


def tokens_of(mixture: Mixture, *, compiled: bool = False) -> tuple[list[list[int | None]], int]:
    """What nine requests get, and in how many steps the next token was under way already."""
    limits = EngineLimits(max_running=6, cache_tokens=8192, compiled=compiled)
    engine, n_ahead = BatchEngine(mixture, BYTES, limits), 0
    got: dict[int, list[int | None]] = {}
    for number in range(9):
        # One goes on alone: requests of different numbers of experts do not run ahead.
        length = 40 if number == 6 else 20
        sampling = SamplingConfig(length, temperature=0.7 * (number % 2), seed=number)
        engine.submit(ask("the fox "[:number], sampling, expert=[None, 1][number % 3 == 2]))
    while not engine.idle:
        for event in engine.step():
            got.setdefault(event.request_id, []).append(event.token)
        n_ahead += bool(engine._ahead)
    return [tokens for _, tokens in sorted(got.items())], n_ahead


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", [*MODES[1:], {"prune": 0.02, "top_k": 3, "temperature": 0.6}])
def test_requests_get_what_they_get_on_a_cpu(mode: dict[str, Any], compiled: bool) -> None:
    expected, _ = tokens_of(mixture_on("cpu", **mode))
    got, n_ahead = tokens_of(mixture_on("cuda", **mode), compiled=compiled)
    assert got == expected
    assert n_ahead > 3


@pytest.mark.parametrize("mode", [{"prune": 0.0, "top_k": k} for k in (2, 4)])
def test_the_host_waits_for_tokens_and_nothing_else(mode: dict[str, Any]) -> None:
    """Not for the pass that is under way: the next one follows it without a gap."""
    engine = BatchEngine(mixture_on("cuda", **mode), BYTES, EngineLimits(2, 8192))
    for text in ("the fox", "a crow"):
        engine.submit(ask(text, SamplingConfig(60, temperature=0.7)))
    for _ in range(20):
        engine.step()
    with no_waiting():
        for _ in range(20):
            engine.step()
    assert engine._ahead


@pytest.mark.parametrize("narrow", ["int8", "fp8"])
@pytest.mark.parametrize("compiled", [False, True])
def test_eight_bit_experts_write_what_they_write_on_a_cpu(compiled: bool, narrow: Narrow) -> None:
    expected, _ = tokens_of(with_narrow_weights(mixture_on("cpu"), narrow))
    got, _ = tokens_of(with_narrow_weights(mixture_on("cuda"), narrow), compiled=compiled)
    assert got == expected


@pytest.mark.parametrize(
    ("dtype", "how"),
    [
        *(
            (dtype, how)
            for dtype in (torch.float32, torch.bfloat16)
            for how in ("usual", "compiled")
        ),
        (torch.bfloat16, "thin"),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_a_recorded_step_equals_the_whole(batch: int, dtype: torch.dtype, how: str) -> None:
    model, tokens = small_expert(**SHAPE).to("cuda", dtype), text_of(batch, 40, vocab_size=257)
    whole = model(tokens.cuda()).float().log_softmax(-1)
    cache = KVCache.allocate(model.config, batch, 40, device=model.device, dtype=dtype)
    start = torch.tensor([1, 15, 17][:batch])
    model.extend(tokens[:, :17].cuda(), cache, start)
    rows = 4 if batch > 1 else 1
    given = {"compiled": how == "compiled", "thin": how == "thin"}
    step = DecodeStep(model, cache.store, rows, 48, **given)
    limit = 1e-5 if dtype == torch.float32 else 0.05
    for t in range(22):
        at = (start + t).tolist()
        rows = [(int(tokens[r, p]), p, list(cache.pages[r])) for r, p in enumerate(at)]
        got = step.run(model, rows)
        expected = torch.stack([whole[r, p] for r, p in enumerate(at)])
        assert (got - expected).norm() / expected.norm() < limit
