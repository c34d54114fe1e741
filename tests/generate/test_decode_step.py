"""A step in fixed shapes says what the general pass says."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from generate.test_batch_engine import ask, run
from generate.test_mixture_decoding import decode, texts
from generate.test_writing_text import BYTES, scripted, small_bytes
from kernels.on_triton import kernels, needs_triton
from mixture.small_mixtures import MODES, small_mixture
from nn.small_experts import BOS, small_expert, text_of
from pyper.config import RopeScaling, SparseConfig
from pyper.generate import BatchEngine, EngineLimits, SamplingConfig
from pyper.generate.decode_step import DecodeStep, has_fixed_shapes
from pyper.generate.thin_layers import ThinLayers
from pyper.generate.usual_layers import after, before, last
from pyper.nn import KVCache

SHAPES: list[dict[str, Any]] = [
    {},
    {"n_kv_heads": 2, "activation": "swiglu", "qk_norm": True, "tie_embeddings": True},
    {"n_kv_heads": 1, "attention_bias": True, "feed_forward_bias": True, "n_layers": 3},
    {
        "norm_position": "post",
        "qk_norm": True,
        "qk_norm_over": "projection",
        "n_kv_heads": 2,
        "attention_output_bias": True,
    },
    {"no_rope_layers": (1,), "rope_scaling": RopeScaling(kind="llama3", factor=8.0)},
]

THIN = [*SHAPES[:3], SHAPES[4], {"no_rope_layers": (0,), "qk_norm": True, "activation": "relu2"}]


@pytest.mark.parametrize(
    ("shape", "thin"), [*((shape, False) for shape in SHAPES), *((shape, True) for shape in THIN)]
)
@torch.no_grad()
def test_steps_equal_the_whole_whatever_the_lengths_of_the_rows(
    shape: dict[str, Any], thin: bool
) -> None:
    model, tokens = small_expert(**shape), text_of(3, 40)
    tokens[:, 0] = BOS
    whole = model(tokens).log_softmax(-1)
    cache = KVCache.allocate(model.config, 3, 40, device=model.device, dtype=model.dtype)
    start = torch.tensor([1, 15, 16])
    model.extend(tokens[:, :16], cache, start)
    step = DecodeStep(model, cache.store, 4, 48, thin=thin)  # one row stays empty
    for t in range(24):
        at = (start + t).tolist()
        rows = [(int(tokens[r, p]), p, list(cache.pages[r])) for r, p in enumerate(at)]
        got = step.run(model, rows)
        expected = torch.stack([whole[r, p] for r, p in enumerate(at)])
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@needs_triton
@pytest.mark.parametrize("shape", THIN)
@torch.no_grad()
def test_thin_layers_say_the_same_as_kernels(shape: dict[str, Any]) -> None:
    model, tokens = small_expert(**shape).to(torch.bfloat16), text_of(2, 20)
    cache = KVCache.allocate(model.config, 2, 32, device=model.device, dtype=model.dtype)
    model.extend(tokens[:, :16], cache, torch.tensor([16, 9]))
    rows = [(int(tokens[r, p]), p, list(cache.pages[r])) for r, p in enumerate((16, 9))]
    expected = DecodeStep(model, cache.store, 2, 32, thin=False).run(model, rows)
    with kernels():
        assert ThinLayers.pay_for(model, 2)
        got = DecodeStep(model, cache.store, 2, 32).run(model, rows)
    assert (got - expected).norm() / expected.norm() < 0.01
    assert not torch.equal(got, expected)  # else no kernel ran


def test_thin_layers_are_for_few_rows_of_blocks_whose_norms_come_first() -> None:
    model = small_expert().to(torch.bfloat16)
    assert not ThinLayers.pay_for(model, 1)  # there are no kernels here
    with kernels():
        assert ThinLayers.pay_for(model, 64)
        assert not ThinLayers.pay_for(model, 128)
        assert not ThinLayers.pay_for(model.float(), 1)
    assert not ThinLayers.fit(small_expert(**SHAPES[3]).config)
    assert not ThinLayers.fit(small_expert(qk_norm=True, qk_norm_over="projection").config)


def test_only_dense_experts_have_fixed_shapes() -> None:
    assert has_fixed_shapes(small_expert())
    assert not has_fixed_shapes(small_expert(kind="sparse", sparse=SparseConfig(n_experts=2)))


@pytest.mark.parametrize("mode", MODES)
def test_a_mixture_in_fixed_shapes_equals_scoring(mode: dict[str, Any]) -> None:
    mixture, tokens = small_mixture("experts", **mode), texts(5)
    scored = mixture.log_probs(tokens)
    n_steps = 0
    for rows, lengths, log_probs, _ in decode(mixture, tokens, [1, 2, 6, 7, 13], fixed_shapes=True):
        torch.testing.assert_close(log_probs, scored[rows, lengths - 1], atol=1e-5, rtol=1e-5)
        n_steps += len(rows)
    assert n_steps == sum(17 - start for start in [1, 2, 6, 7, 13])


@pytest.fixture
def shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a recorded step may overwrite what any other, of any expert, gave."""
    usual, given = DecodeStep.run, list[Tensor]()

    def run(step: DecodeStep, *args: Any) -> Tensor:
        while given:
            given.pop().fill_(torch.nan)
        given.append(usual(step, *args))
        return given[0]

    monkeypatch.setattr(DecodeStep, "run", run)


@pytest.mark.usefixtures("shared_memory")
@pytest.mark.parametrize(
    "mode",
    [*MODES[1:], {"prune": 0.02, "top_k": 4, "temperature": 0.6}, {"prune": 0.2, "top_k": 2}],
)
def test_requests_that_come_and_go_get_the_same_in_fixed_shapes(mode: dict[str, Any]) -> None:
    """Tokens that are read before the host has seen them included."""
    mixture, n_ahead = small_bytes(**mode), 0

    def written(fixed_shapes: bool) -> dict[int, list[tuple[object, ...]]]:
        nonlocal n_ahead
        rng = random.Random(1)
        limits = EngineLimits(max_running=3, cache_tokens=8192)
        engine = BatchEngine(mixture, BYTES, limits, fixed_shapes=fixed_shapes)
        got: dict[int, list[tuple[object, ...]]] = {}
        for number in range(60):
            if number < 20 and rng.random() < 0.6:
                sampling = SamplingConfig(
                    rng.randrange(1, 25),
                    rng.choice([0.0, 0.8]),
                    stop=rng.choice([(), ("a", "e")]),
                    repetition_penalty=rng.choice([1.0, 1.0, 1.0, 1.5]),
                    seed=number,
                )
                text, pinned = "abcdefghi"[: rng.randrange(10)], rng.choice([None, 2])
                engine.submit(ask(text, sampling, expert=pinned, n_logprobs=rng.choice([0, 2])))
            for event in engine.step():
                alternatives = tuple(token for token, _ in event.alternatives)
                seen = (event.token, event.text, alternatives, event.expert, event.finished)
                got.setdefault(event.request_id, []).append(seen)
            n_ahead += bool(engine._ahead)
        while not engine.idle:
            for event in engine.step():
                got.setdefault(event.request_id, []).append((event.token,))
        assert engine.stats().cache_tokens_used == 0
        return got

    expected = written(False)
    assert n_ahead == 0
    got = written(True)
    assert n_ahead > 3
    assert {n: [e[0] for e in events] for n, events in got.items()} == {
        n: [e[0] for e in events] for n, events in expected.items()
    }


def test_what_a_row_has_seen_includes_tokens_that_are_under_way() -> None:
    mixture = small_bytes(mixing="top1")

    def written(fixed_shapes: bool) -> tuple[dict[int, list[int | None]], int]:
        limits, n_ahead = EngineLimits(cache_tokens=8192), 0
        engine = BatchEngine(mixture, BYTES, limits, fixed_shapes=fixed_shapes)
        for n, penalty in enumerate([5.0, 1.0, 8.0]):  # who asks for nothing leaves in between
            sampling = SamplingConfig([30, 12, 25][n], n * 0.4, repetition_penalty=penalty, seed=n)
            engine.submit(ask("abcdefgh", sampling))
        got: dict[int, list[int | None]] = {}
        while not engine.idle:
            for event in engine.step():
                got.setdefault(event.request_id, []).append(event.token)
            n_ahead += bool(engine._ahead)
        return got, n_ahead

    expected, _ = written(False)
    got, n_ahead = written(True)
    assert got == expected
    assert len(set(got[1])) == len(got[1])  # the greedy one never says anything twice
    assert n_ahead > 20


def test_who_is_cancelled_while_its_next_token_is_under_way_is_gone() -> None:
    mixture = scripted("abcdefghijklmnopqrstuvwxyz", seq_len=64)
    engine = BatchEngine(mixture, BYTES, EngineLimits(cache_tokens=8192), fixed_shapes=True)
    first, second = (engine.submit(ask(c, SamplingConfig(40, 0.0))) for c in "ab")
    engine.step()
    assert engine._ahead
    engine.cancel(first)
    events = [*engine.step(), *engine.step()]
    assert [e.request_id for e in events] == [second] * 2
    third = engine.submit(ask("x", SamplingConfig(40, 0.0)))
    by_request = run(engine)
    assert "".join(e.text for e in by_request[third]) == "yz"
    assert "".join(e.text for e in by_request[second]) == "fghijklmnopqrstuvwxyz"
    engine.submit(ask("v", SamplingConfig(40, 0.0)))
    engine.step()
    engine.cancel(engine._last_id)
    assert engine.idle
    assert engine.step() == []
    assert engine.stats().cache_tokens_used == 0
    fourth = engine.submit(ask("w", SamplingConfig(40, 0.0)))
    assert "".join(e.text for e in run(engine)[fourth]) == "xyz"


@torch.no_grad()
def test_the_compiled_parts_are_one_graph_each_for_all_layers_and_experts() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    parts = [
        torch.compile(p, backend=counter, fullgraph=True, dynamic=False)
        for p in (before, after, last)
    ]
    for seed in range(2):
        model = small_expert(seed, n_layers=3)
        x, turn = torch.randn(1, 16), torch.randn(1, 1, 4)
        for block in model.blocks:
            query, _, value = parts[0](block, x, turn, turn)
            assert query.shape == value.shape == (1, 4, 4)
            torch.testing.assert_close(parts[1](block, x, value), after(block, x, value))
        torch.testing.assert_close(parts[2](model, x), last(model, x))
    assert counter.frame_count == 3
    torch._dynamo.reset()
