"""Balanced EM finds the domains that are there."""

import numpy as np
import pytest
import torch

from mixture.small_documents import documents_of, draw_documents
from pyper.data import Documents
from pyper.errors import DataError
from pyper.mixture import Domains, assign_documents, discover_unigram
from pyper.mixture.discovery import read_excerpts, unigram_scores


def found(documents: Documents, seed: int = 0, n_experts: int = 4) -> Domains:
    return discover_unigram(documents, 40, n_experts, rounds=20, random_seed=seed)


def purity(expert: torch.Tensor, documents: Documents) -> float:
    """Share of the documents that lie with the majority of their group."""
    domain = torch.from_numpy(documents.domain_index.astype(np.int64))
    table = torch.bincount(expert * 4 + domain, minlength=16).view(4, 4)
    return float(table.max(1).values.sum() / table.sum())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_four_kinds_of_text_are_told_apart_at_equal_load(seed: int) -> None:
    documents = draw_documents(seed)
    assignment = assign_documents(found(documents, seed), documents, balanced=True)
    assert purity(assignment.expert, documents) >= 0.95
    longest = documents.lengths.max() / documents.n_tokens
    assert (assignment.load - 0.25).abs().max() <= longest
    tokens = torch.from_numpy(documents.lengths).double()
    own = torch.bincount(assignment.expert, tokens, minlength=4)
    torch.testing.assert_close(assignment.load, own / own.sum())


def test_held_out_text_follows_its_domain() -> None:
    documents, held_out = draw_documents(0), draw_documents(9, n_per_domain=25)
    domains = found(documents)
    assignment = assign_documents(domains, held_out, balanced=False)
    assert purity(assignment.expert, held_out) >= 0.95
    home = assign_documents(domains, documents, balanced=True).expert
    for domain in range(4):
        there, here = (
            expert[torch.from_numpy(d.domain_index == domain)].mode().values
            for expert, d in ((home, documents), (assignment.expert, held_out))
        )
        assert there == here


def test_held_out_text_pays_the_prices_of_training_per_token() -> None:
    documents, held_out = draw_documents(0), draw_documents(9, n_per_domain=5)
    domains = found(documents)
    dear = torch.tensor([0.0, 1.0, 3.0, -2.0])
    priced = Domains(domains.log_probs, dear, 0.0, [])
    got = assign_documents(priced, held_out, balanced=False)
    for index in range(held_out.n_documents):
        tokens = torch.from_numpy(held_out.tokens(index).astype(np.int64))
        value = domains.log_probs[:, tokens].sum(1) - len(tokens) * dear
        assert int(got.expert[index]) == int(value.argmax())
    free = assign_documents(domains, held_out, balanced=False)
    assert not torch.equal(got.expert, free.expert)


def test_a_split_without_documents_has_no_experts() -> None:
    domains = found(draw_documents(0))
    for balanced in (True, False):
        got = assign_documents(domains, documents_of([], []), balanced=balanced)
        assert got.expert.shape == (0,)
        assert got.load.tolist() == [0.0] * 4


def test_discovery_is_reproducible() -> None:
    documents = draw_documents(3)
    first, again = found(documents, 7), found(documents, 7)
    assert torch.equal(first.log_probs, again.log_probs)
    assert torch.equal(first.prices, again.prices)
    assert first.history == again.history


def test_rounds_raise_the_likelihood() -> None:
    domains = found(draw_documents(4))
    assert domains.log_likelihood == domains.history[-1] >= domains.history[0]
    torch.testing.assert_close(domains.log_probs.exp().sum(-1), torch.ones(4))


def test_fewer_documents_than_experts_are_refused() -> None:
    documents = draw_documents(0, n_per_domain=1)
    assert assign_documents(found(documents), documents, balanced=True).expert.max() < 4
    with pytest.raises(DataError, match="4 documents cannot be divided among 5 experts") as caught:
        found(documents, n_experts=5)
    assert "n_experts" in caught.value.hint


def test_the_unread_rest_of_a_long_document_counts_like_its_beginning() -> None:
    long = documents_of([np.arange(3071) % 39 + 1, np.array([1, 2])], [0, 0])
    excerpts = read_excerpts(long)
    assert excerpts.lengths.tolist() == [1024, 3]
    assert excerpts.weights.tolist() == [3072, 3]
    table = torch.randn(2, 40, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    scores = unigram_scores(table, excerpts)
    beginning = torch.from_numpy(long.read(0, 0, 1024).astype(np.int64))
    torch.testing.assert_close(scores[0], 3 * table[:, beginning].sum(1), atol=0, rtol=1e-4)
    torch.testing.assert_close(scores[1], table[:, [0, 1, 2]].sum(1))
