"""A beginning that is read in a fixed shape says what the whole model says."""

from typing import Any

import pytest
import torch
from torch import Tensor

from generate.test_batch_engine import ask, run
from generate.test_decode_step import SHAPES
from generate.test_writing_text import BYTES, small_bytes
from mixture.small_mixtures import MODES
from nn.small_experts import BOS, small_expert, text_of
from pyper.generate import BatchEngine, EngineLimits, SamplingConfig
from pyper.generate.decode_step import DecodeStep
from pyper.generate.prefill_step import PrefillStep, filled_length
from pyper.nn import PAGE_TOKENS, KVStore

PAGES = [3, 1, 4]


@pytest.mark.parametrize("n_tokens", [1, 16, 17, 31, 32])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_states_and_what_is_read_afterwards_equal_the_whole(
    shape: dict[str, Any], n_tokens: int
) -> None:
    model, tokens = small_expert(**shape), text_of(40)
    tokens[0] = BOS
    whole = model(tokens[None])[0].log_softmax(-1)
    store = KVStore.allocate(model.config, 5, device=model.device, dtype=model.dtype)
    step = PrefillStep(model, store, 32)
    step.run(model, text_of(32, seed=1).tolist(), PAGES)  # another text, of which nothing stays
    states = step.run(model, tokens[:n_tokens].tolist(), PAGES)
    said = model.head(states).log_softmax(-1)
    torch.testing.assert_close(said, whole[:n_tokens], atol=1e-5, rtol=1e-5)
    one = DecodeStep(model, store, 1, 48)
    for at in range(n_tokens, 40):
        got = one.run(model, [(int(tokens[at]), at, PAGES)])[0]
        torch.testing.assert_close(got, whole[at], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_is_filled_in_touches_no_page_of_the_text_or_of_others() -> None:
    model = small_expert()
    store = KVStore.allocate(model.config, 5, device=model.device, dtype=model.dtype)
    PrefillStep(model, store, 32).run(model, text_of(17).tolist(), PAGES)
    written = store.keys.flatten(2).any(dim=-1).all(dim=0)
    page = [3] * PAGE_TOKENS + [1]
    slots = {0} | {p * PAGE_TOKENS + i % PAGE_TOKENS for i, p in enumerate(page)}
    assert set(written.nonzero().flatten().tolist()) == slots


def test_lengths_are_powers_of_two_and_none_is_tiny() -> None:
    assert [filled_length(n) for n in (1, 16, 17, 64, 1000, 4096)] == [16, 16, 32, 64, 1024, 4096]


@pytest.mark.parametrize("mode", MODES)
def test_prompts_of_a_length_that_came_before_are_read_so_and_get_the_same(
    mode: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, lengths = PrefillStep.run, []

    def read(step: PrefillStep, model: Any, tokens: Any, pages: Any) -> Tensor:
        lengths.append((step.length, len(tokens)))
        return usual(step, model, tokens, pages)

    monkeypatch.setattr(PrefillStep, "run", read)

    def written(fixed_shapes: bool) -> list[list[int | None]]:
        limits = EngineLimits(cache_tokens=8192)
        engine = BatchEngine(small_bytes(**mode), BYTES, limits, fixed_shapes=fixed_shapes)
        got = []
        for seed, text in enumerate(("abcdefgh", "xyz xyz", "so", "to be", 6 * "long ")):
            engine.submit(ask(text, SamplingConfig(9, 0.8 * (seed % 2), seed=seed)))
            got += [[event.token for event in events] for events in run(engine).values()]
        return got

    expected = written(False)
    assert lengths == []
    assert written(True) == expected
    assert len(lengths) >= 3
    assert {length for length, _ in lengths} == {16}  # a longer one comes once
