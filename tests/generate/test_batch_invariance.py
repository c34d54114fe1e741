"""A request's logits are, to the last bit, those it gets alone, whatever its neighbours."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from mixture.small_mixtures import loaders_of, small_mixture, small_settings
from nn.small_experts import BOS, small_expert
from pyper.config import SparseConfig
from pyper.generate.mixture_reader import MixtureReader
from pyper.generate.reading import Text
from pyper.mixture import Mixture

CAPACITY = 48
SPARSE = {"n_experts": 3, "routing": "token_choice", "top_k": 2}
SHAPES: list[dict[str, Any]] = [
    {},
    {"n_kv_heads": 2, "activation": "swiglu", "d_model": 40, "head_dim": 10},
    {"qk_norm": True, "d_model": 64, "n_layers": 3, "attention_bias": True},
    {"kind": "sparse", "sparse": SparseConfig(**SPARSE)},
    {"kind": "sparse", "sparse": SparseConfig(n_experts=3, attention_experts=2)},
    {"kind": "token_mixture", "sparse": SparseConfig(n_experts=3, stem_layers=1)},
]


def single(shape: dict[str, Any], dtype: torch.dtype) -> Mixture:
    model = small_expert(std=0.4, **shape).to(dtype)
    settings = small_settings(experts=("only",), router="experts")
    return Mixture(settings, loaders_of([model]), None)


def some_text(rng: random.Random, length: int) -> list[int]:
    return [BOS, *(rng.randrange(1, 17) for _ in range(length - 1))]


def new_reader(mixture: Mixture, prefill_chunk: int = 512) -> MixtureReader:
    return MixtureReader(mixture, cache_tokens=4096, prefill_chunk=prefill_chunk)


@torch.no_grad()
def write(
    reader: MixtureReader, script: list[int], start: int, rng: random.Random | None = None
) -> list[Tensor]:
    """What is predicted of each token of `script` from `start` on.

    rng: neighbours come, go, and write beside it; a third of them begins as it does.
    """
    watched = reader.open(script[:start], CAPACITY)
    neighbours: list[Text] = []
    said: list[Tensor] = []
    while len(watched.tokens) < len(script):
        while rng and len(neighbours) < 12 and rng.random() < 0.6:
            length = rng.randrange(1, CAPACITY - 1)
            begin = script[:length] if rng.random() < 0.3 else some_text(rng, length)
            neighbours.append(reader.open(begin, CAPACITY))
        for predicted in reader.predict(reader.advance([*neighbours, watched])):
            for i, text in enumerate(predicted.texts):
                token = int(predicted.log_probs[i].argmax())
                if text is watched:
                    said.append(predicted.log_probs[i].clone())
                    token = script[len(text.tokens)]
                scores = predicted.per_expert[i, :, token].tolist()
                reader.append(text, token, predicted.experts[i], scores)
        for text in [t for t in neighbours if len(t.tokens) == CAPACITY or rng.random() < 0.1]:
            reader.close(text)
            neighbours.remove(text)
    for text in [watched, *neighbours]:
        reader.close(text)
    return said


def assert_the_same(alone: list[Tensor], together: list[Tensor]) -> None:
    assert len(alone) == len(together)
    for mine, beside_others in zip(alone, together, strict=True):
        assert torch.equal(mine, beside_others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_neighbours_change_no_bit(shape: dict[str, Any], dtype: torch.dtype) -> None:
    mixture = single(shape, dtype)
    for seed in range(3):
        rng = random.Random(seed)
        script, start = some_text(rng, 40), rng.randrange(1, 38)
        alone = write(new_reader(mixture), script, start)
        assert_the_same(alone, write(new_reader(mixture, rng.randrange(3, 60)), script, start, rng))


@pytest.mark.parametrize("mixing", ["posterior", "top1", "window"])
@pytest.mark.parametrize("router", ["unigram", "lm", "experts"])
def test_neighbours_change_no_bit_of_a_mixture(mixing: str, router: str) -> None:
    mixture = small_mixture(router, mixing=mixing, top_k=3, prune=0.01)
    rng = random.Random(1)
    script = some_text(rng, 40)
    for start in (1, 9, 33):
        alone = write(new_reader(mixture), script, start)
        assert_the_same(alone, write(new_reader(mixture, 20), script, start, rng))


@pytest.mark.parametrize("prefill_chunk", [1, 7, 16, 20])
def test_how_a_prompt_is_cut_changes_no_bit(prefill_chunk: int) -> None:
    mixture = small_mixture(top_k=4)
    script = some_text(random.Random(2), 40)
    alone = write(new_reader(mixture), script, 37)
    assert_the_same(alone, write(new_reader(mixture, prefill_chunk), script, 37))


@pytest.mark.parametrize("shape", SHAPES)
def test_pages_of_another_text_change_no_bit(shape: dict[str, Any]) -> None:
    """Those of a prompt as well as those of what was written, which a conversation sends again."""
    mixture, script = single(shape, torch.float32), some_text(random.Random(3), 44)
    reader = new_reader(mixture)
    write(reader, script[:40], 20)
    read_before = reader.n_prefilled
    again = write(reader, script, 38)
    assert reader.n_reused == 32
    assert reader.n_prefilled - read_before == 38 - 32
    assert_the_same(write(new_reader(mixture), script, 38), again)


@pytest.mark.parametrize("router", ["unigram", "experts"])
@pytest.mark.parametrize("mixing", ["posterior", "top1", "window"])
def test_pages_of_another_text_change_no_bit_of_a_mixture(mixing: str, router: str) -> None:
    mixture = small_mixture(router, mixing=mixing, top_k=3)
    script, reader = some_text(random.Random(4), 44), new_reader(mixture)
    write(reader, script[:40], 20)
    again = write(reader, script, 38)
    assert reader.n_reused > 0
    assert_the_same(write(new_reader(mixture), script, 38), again)
