"""A step in fixed shapes says what the general pass says."""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from generate.test_batch_engine import ask, run
from generate.test_mixture_decoding import decode, texts
from generate.test_writing_text import BYTES, small_bytes
from mixture.small_mixtures import MODES, small_mixture
from nn.small_experts import BOS, small_expert, text_of
from pyper.config import SparseConfig
from pyper.generate import BatchEngine, EngineLimits, SamplingConfig
from pyper.generate.decode_step import DecodeStep, after, before, has_fixed_shapes, last
from pyper.nn import KVCache

SHAPES: list[dict[str, Any]] = [
    {},
    {"n_kv_heads": 2, "activation": "swiglu", "qk_norm": True, "tie_embeddings": True},
    {"n_kv_heads": 1, "attention_bias": True, "feed_forward_bias": True, "n_layers": 3},
]


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_steps_equal_the_whole_whatever_the_lengths_of_the_rows(shape: dict[str, Any]) -> None:
    model, tokens = small_expert(**shape), text_of(3, 40)
    tokens[:, 0] = BOS
    whole = model(tokens).log_softmax(-1)
    cache = KVCache.allocate(model.config, 3, 40, device=model.device, dtype=model.dtype)
    start = torch.tensor([1, 15, 16])
    model.extend(tokens[:, :16], cache, start)
    step = DecodeStep(model, cache.store, 4, 48)  # one row stays empty
    for t in range(24):
        at = (start + t).tolist()
        rows = [(int(tokens[r, p]), p, list(cache.pages[r])) for r, p in enumerate(at)]
        got = step.run(model, rows)
        expected = torch.stack([whole[r, p] for r, p in enumerate(at)])
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


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


def test_greedy_text_is_the_same_in_fixed_shapes() -> None:
    def written(fixed_shapes: bool) -> list[list[int | None]]:
        limits = EngineLimits(cache_tokens=8192)
        engine = BatchEngine(small_bytes(), BYTES, limits, fixed_shapes=fixed_shapes)
        for text in ("", "abc", "x" * 20, "abc"):
            engine.submit(ask(text, SamplingConfig(12, 0.0)))
        return [[e.token for e in events] for events in run(engine).values()]

    assert written(True) == written(False)


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
