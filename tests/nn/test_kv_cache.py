"""Reading in pieces equals reading at once."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nn.small_experts import BOS, small_expert, text_of
from pyper.config import RopeScaling
from pyper.errors import PromptError
from pyper.nn import PAGE_TOKENS, KVCache, Transformer

LENGTH = 20
LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_seq_len=24)
SHAPES: list[dict[str, Any]] = [
    {},
    {"n_kv_heads": 2, "activation": "swiglu"},
    {"n_kv_heads": 1, "qk_norm": True, "attention_bias": True},
    {"attend_across_documents": False},
    {"rope_scaling": RopeScaling(kind="yarn", factor=2.0, original_seq_len=24), "head_dim": 8},
    {
        "norm_position": "post",
        "qk_norm": True,
        "qk_norm_over": "projection",
        "n_kv_heads": 2,
        "attention_output_bias": True,
    },
    {"no_rope_layers": (1,), "rope_scaling": LLAMA3},
]


def empty_cache(model: Transformer, batch: int, capacity: int = LENGTH) -> KVCache:
    return KVCache.allocate(model.config, batch, capacity, device=model.device, dtype=model.dtype)


def document(batch: int) -> Tensor:
    tokens = text_of(batch, LENGTH)
    tokens[:, 0] = BOS
    return tokens


def assert_same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("pieces", [[1] * LENGTH, [LENGTH], [7, 1, 1, 11], [3, 4, 13]])
@torch.no_grad()
def test_pieces_equal_the_whole(changes: dict[str, Any], pieces: list[int]) -> None:
    model, tokens = small_expert(**changes), document(3)
    cache = empty_cache(model, 3)
    states = [model.extend(part, cache) for part in tokens.split(pieces, dim=1)]
    assert cache.lengths.tolist() == [LENGTH] * 3
    assert_same(model.head(torch.cat(states, dim=1)), model(tokens))


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_rows_of_different_lengths_do_not_disturb_each_other(
    changes: dict[str, Any], seed: int
) -> None:
    model, tokens = small_expert(**changes), document(4)
    whole, cache = model(tokens), empty_cache(model, 4)
    generator = torch.Generator().manual_seed(seed)
    while int(cache.lengths.min()) < LENGTH:
        start = cache.lengths
        n_new = torch.randint(0, 6, (4,), generator=generator).clamp(max=LENGTH - start)
        # Padding reaches past the end of the full rows: it must not hit what they hold.
        width = int(n_new.max()) + 2
        index = start[:, None] + torch.arange(width)
        new = tokens.gather(1, index.clamp(max=LENGTH - 1))
        new = torch.where(torch.arange(width) < n_new[:, None], new, 16 - new)
        states = model.extend(new, cache, n_new)
        assert torch.equal(cache.lengths, start + n_new)
        for row in range(4):
            real = slice(int(start[row]), int(start[row] + n_new[row]))
            assert_same(model.head(states[row, : n_new[row]]), whole[row, real])


@torch.no_grad()
def test_some_rows_can_be_taken_out_and_put_back() -> None:
    model, tokens = small_expert(n_kv_heads=2), document(3)
    cache = empty_cache(model, 3)
    model.extend(tokens[:, :5], cache)
    rows = torch.tensor([0, 2])
    part = cache.select_rows(rows)
    model.extend(tokens[rows, 5:9], part)
    assert cache.lengths.tolist() == [5, 5, 5]
    cache.update_rows(rows, part)
    assert cache.lengths.tolist() == [9, 5, 9]
    n_new = torch.tensor([1, 5, 1])
    after = model.extend(
        torch.stack([tokens[0, 9:14], tokens[1, 5:10], tokens[2, 9:14]]), cache, n_new
    )
    whole = model(tokens)
    assert_same(model.head(after[rows, 0]), whole[rows, 9])
    assert_same(model.head(after[1]), whole[1, 5:10])


@torch.no_grad()
def test_a_full_cache_refuses_more() -> None:
    model, tokens = small_expert(), document(2)
    cache = empty_cache(model, 2, capacity=8)
    model.extend(tokens[:, :6], cache)
    with pytest.raises(PromptError, match="holds 8 tokens, 9 are needed") as caught:
        model.extend(tokens[:, 6:9], cache)
    assert caught.value.hint
    model.extend(tokens[:, 6:9], cache, torch.tensor([2, 1]))
    assert cache.lengths.tolist() == [8, 7]


@torch.no_grad()
def test_text_beyond_the_context_is_refused() -> None:
    model = small_expert(seq_len=8)
    with pytest.raises(PromptError, match="9 tokens do not fit the context of 8") as caught:
        model(text_of(1, 9))
    assert "rope_scaling" in caught.value.hint
    cache = empty_cache(model, 1)
    model.extend(text_of(1, 8), cache)
    with pytest.raises(PromptError, match="context of 8"):
        model.extend(text_of(1, 1), cache)


def test_an_empty_cache_has_the_announced_shape() -> None:
    cache = empty_cache(small_expert(n_kv_heads=2), 3, capacity=PAGE_TOKENS + 1)
    assert cache.capacity == PAGE_TOKENS + 1
    # Two pages for each row, and the one that belongs to nobody.
    assert cache.store.keys.shape == cache.store.values.shape == (2, 7 * PAGE_TOKENS, 2, 4)
    assert cache.lengths.tolist() == [0, 0, 0]
    assert sorted(p for pages in cache.pages for p in pages) == [1, 2, 3, 4, 5, 6]
