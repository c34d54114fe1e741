"""No routed model that says so looks ahead or beside: finite changes, trained weights.

Gradients would show nothing, since which tokens are chosen has none.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from nn.small_experts import BOS, change_from, random_cuts
from nn.trained_sparse import CAUSAL, CHOOSING, LENGTH, structured_text, trained
from pyper.nn import KVCache, Rule, Transformer

pytestmark = pytest.mark.usefixtures("one_thread")
N_CUTS = 60
ROUNDING = 1e-10
"""In float64; the controls exceed it by a factor of ten million."""


def logits(model: Transformer, tokens: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.head(model.read(tokens, **options).states)
    return out


def furthest(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


def moved_before_and_after(name: str, rule: Rule | None = None) -> tuple[float, float]:
    """How far changes at 60 random places moved logits before them, and after."""
    model, tokens = trained(name), structured_text(N_CUTS, seed=1000)
    cuts = random_cuts(N_CUTS, LENGTH)
    moved = logits(model, tokens, rule=rule) - logits(model, change_from(tokens, cuts), rule=rule)
    earlier = torch.arange(LENGTH) < cuts[:, None]
    size = moved.abs().amax(dim=-1)
    return float(size[earlier].max()), float(size[~earlier].max())


@pytest.mark.parametrize("name", CAUSAL)
def test_training_made_routing_a_matter_of_context(name: str) -> None:
    """The checks below would be empty where all tokens, or equal ones, went the same way."""
    model, tokens = trained(name), structured_text(64, seed=1001)
    with torch.no_grad():
        routed = model.read(tokens).routed
    for layer in routed:
        share = layer.statistics.expert_load / layer.statistics.n_tokens
        assert float(share.max()) < 0.95
        assert int((share > 0.02).sum()) >= 2
        assert 0.2 < float(share.sum()) < 2.5
    choices = []
    stack = model.experts if model.experts is not None else model.blocks[-1].feed_forward
    hook = stack.register_forward_pre_hook(lambda _, inputs: choices.append(inputs[0]))
    with torch.no_grad():
        model.read(tokens)
    hook.remove()
    best = (choices[0] @ stack.router.weight.T).argmax(dim=-1)
    ways = [len(best[tokens == token].unique()) for token in range(1, 17)]
    assert max(ways) > 1


@pytest.mark.parametrize("name", CAUSAL)
def test_a_change_moves_no_earlier_logit(name: str) -> None:
    before, after = moved_before_and_after(name)
    assert before < ROUNDING
    assert after > 1e-2


@pytest.mark.parametrize("name", CHOOSING)
def test_expert_choice_looks_ahead(name: str) -> None:
    """The control: the same weights and the same check."""
    before, _ = moved_before_and_after(name, "expert_choice")
    assert before > 1e7 * ROUNDING


@pytest.mark.parametrize("name", [n for n in CHOOSING if not n.startswith("token mixture")])
def test_expert_choice_within_a_sequence_looks_ahead(name: str) -> None:
    before, _ = moved_before_and_after(name, "per_sequence")
    assert before > 1e7 * ROUNDING


@pytest.mark.parametrize("name", CAUSAL)
def test_a_sequence_reads_the_same_in_any_company(name: str) -> None:
    model, tokens = trained(name), structured_text(6, seed=1002)
    alone = torch.cat([logits(model, row[None]) for row in tokens])
    others = torch.cat([tokens[:3], structured_text(29, seed=1003)])
    assert furthest(logits(model, tokens), alone) < ROUNDING
    assert furthest(logits(model, others)[:3], alone[:3]) < ROUNDING
    assert furthest(logits(model, tokens.flip(0)), alone.flip(0)) < ROUNDING


@pytest.mark.parametrize("name", CHOOSING)
def test_under_expert_choice_company_matters(name: str) -> None:
    model, tokens = trained(name), structured_text(6, seed=1002)
    others = torch.cat([tokens[:3], structured_text(29, seed=1003)])
    ours, theirs = (logits(model, t, rule="expert_choice")[:3] for t in (tokens, others))
    assert furthest(ours, theirs) > 1e7 * ROUNDING


@pytest.mark.parametrize("name", CAUSAL)
def test_padding_on_the_right_changes_nothing(name: str) -> None:
    model, tokens = trained(name), structured_text(5, seed=1004)
    lengths = torch.tensor([LENGTH, 3, 11, 17, 1])
    padding = torch.arange(LENGTH + 6) >= lengths[:, None]
    padded = structured_text(5, seed=1005, length=LENGTH + 6)
    padded[:, :LENGTH] = torch.where(padding[:, :LENGTH], padded[:, :LENGTH], tokens)
    ours, expected = logits(model, padded, padding=padding), logits(model, tokens)
    real = ~padding[:, :LENGTH]
    assert furthest(ours[:, :LENGTH][real], expected[real]) < ROUNDING


@pytest.mark.parametrize("name", CAUSAL)
def test_a_prefix_reads_as_it_does_inside_the_whole(name: str) -> None:
    model, tokens = trained(name), structured_text(3, seed=1006)
    whole = logits(model, tokens)
    for length in range(1, LENGTH):
        assert furthest(logits(model, tokens[:, :length]), whole[:, :length]) < ROUNDING


def new_cache(model: Transformer, batch: int) -> KVCache:
    return KVCache.allocate(model.config, batch, LENGTH, device=model.device, dtype=model.dtype)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("pieces", [[1] * LENGTH, [LENGTH], [7, 1, 1, 15]])
@torch.no_grad()
def test_decoding_with_a_cache_equals_reading_the_whole(name: str, pieces: list[int]) -> None:
    model, tokens = trained(name), structured_text(4, seed=1007)
    cache = new_cache(model, 4)
    states = [model.extend(part, cache) for part in tokens.split(pieces, dim=1)]
    assert furthest(model.head(torch.cat(states, dim=1)), logits(model, tokens)) < ROUNDING


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_rows_of_different_lengths_decode_beside_each_other(name: str) -> None:
    """Padding, rows that wait, and rows that are taken out of the cache and put back."""
    model, tokens = trained(name), structured_text(4, seed=1008)
    whole, cache = logits(model, tokens), new_cache(model, 4)
    generator = torch.Generator().manual_seed(0)
    while int(cache.lengths.min()) < LENGTH:
        n_rows = int(torch.randint(1, 5, (1,), generator=generator))
        rows = torch.randperm(4, generator=generator)[:n_rows]
        part = cache.select_rows(rows)
        start = part.lengths
        n_new = torch.randint(0, 5, (len(rows),), generator=generator).clamp(max=LENGTH - start)
        width = int(n_new.max()) + 2  # at the end it reaches beyond the cache
        index = start[:, None] + torch.arange(width)
        new = tokens[rows].gather(1, index.clamp(max=LENGTH - 1))
        new = torch.where(torch.arange(width) < n_new[:, None], new, 17 - new.clamp(min=1))
        states = model.head(model.extend(new, part, n_new))
        cache.update_rows(rows, part)
        for i, row in enumerate(rows.tolist()):
            real = slice(int(start[i]), int(start[i] + n_new[i]))
            if n_new[i]:
                assert furthest(states[i, : n_new[i]], whole[row, real]) < ROUNDING


@torch.no_grad()
def test_documents_apart_do_not_read_each_other() -> None:
    model = trained("token mixture, documents apart")
    first, second = structured_text(3, seed=1009, length=10), structured_text(3, 1010, length=14)
    together = logits(model, torch.cat([first, second], dim=1))
    assert int((first == BOS).sum()) == 3
    assert furthest(together[:, :10], logits(model, first)) < ROUNDING
    assert furthest(together[:, 10:], logits(model, second)) < ROUNDING
