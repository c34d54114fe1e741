"""Domains seen more or less often, in exact numbers; batches shared among processes."""

from collections import Counter
from contextlib import closing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyper.data import Documents, Loader, LoaderPosition, effective_tokens, epoch_documents
from pyper.data.domain_weights import seen_after
from pyper.errors import DataError

WEIGHTS = {"letters": 0.5, "poems": 2.0}


def open_loader(documents: Documents, **changed: object) -> Loader:
    chosen = {"seq_len": 50, "batch_size": 6, "random_seed": 3} | changed
    return Loader(documents, **chosen)  # type: ignore[arg-type]


def take(loader: Loader, n: int) -> torch.Tensor:
    return torch.cat([loader.next_batch().tokens for _ in range(n)])


def counts_by_epoch(documents: Documents, weights: dict[str, float], n: int) -> list[Counter[int]]:
    return [Counter(epoch_documents(documents, weights, 7, e).tolist()) for e in range(n)]


def test_a_weight_of_two_is_every_document_twice_and_a_half_is_another_half_each_epoch(
    documents: Documents,
) -> None:
    poems = np.flatnonzero(documents.domain_index == documents.domains.index("poems"))
    letters = np.flatnonzero(documents.domain_index == documents.domains.index("letters"))
    first, second, third, fourth = counts_by_epoch(documents, WEIGHTS, 4)
    for epoch in (first, second, third, fourth):
        assert all(epoch[i] == 2 for i in poems)
    seen = [{i for i in letters if epoch[i]} for epoch in (first, second)]
    assert abs(len(seen[0]) - len(letters) / 2) <= 1
    assert not seen[0] & seen[1] or len(letters) % 2
    together = first + second + third + fourth
    assert {together[i] for i in letters} == {2}


@given(
    weight=st.decimals(0, 5, places=2).map(float),
    n=st.integers(1, 40),
    epochs=st.integers(1, 12),
)
@settings(max_examples=200, deadline=None)
def test_documents_are_seen_as_often_as_a_loop_round_a_circle_sees_them(
    weight: float, n: int, epochs: int
) -> None:
    """Brute force: walk round the circle one document at a time."""
    walked, total = Counter[int](), 0
    for epoch in range(1, epochs + 1):
        due = round(weight * 100) * n * epoch // 100  # whole hundredths: exact
        while total < due:
            walked[total % n] += 1
            total += 1
        assert seen_after(epoch, weight, n) == total
    assert max(walked.values(), default=0) - min(walked[i] for i in range(n)) <= 1


def test_ten_epochs_of_a_tenth_are_one_whole_although_floats_are_not(documents: Documents) -> None:
    together = sum(counts_by_epoch(documents, {"poems": 0.1}, 10), Counter[int]())
    poems = np.flatnonzero(documents.domain_index == documents.domains.index("poems"))
    assert {together[i] for i in poems} == {1}


def test_effective_tokens_are_those_of_the_epochs(documents: Documents) -> None:
    epochs = [epoch_documents(documents, WEIGHTS, 7, e) for e in range(2)]
    read = sum(int(documents.lengths[chosen].sum()) for chosen in epochs)
    letters = documents.lengths[documents.domain_index == 0]
    assert abs(read / 2 - effective_tokens(documents, WEIGHTS)) <= letters.max()
    assert effective_tokens(documents, {}) == documents.n_tokens


def test_the_loader_reads_the_weighted_mixture_epoch_after_epoch(documents: Documents) -> None:
    """Every epoch's windows, put together again, are its documents' tokens."""
    with closing(open_loader(documents, domain_weights=WEIGHTS, batch_size=1)) as loader:
        for epoch in range(3):
            chosen = epoch_documents(documents, WEIGHTS, 3, epoch)
            n = (int(documents.lengths[chosen].sum()) - 1) // 50
            assert loader.sequences_in(epoch) == n
            assert loader.position == LoaderPosition(epoch, 0)
            batches = [loader.next_batch() for _ in range(n)]
            read = Counter(torch.cat([b.targets.flatten() for b in batches]).tolist())
            everything = Counter(np.concatenate([documents.tokens(i) for i in chosen]).tolist())
            assert not read - everything
            assert (everything - read).total() <= 51


def test_without_weights_epochs_are_what_they_were(documents: Documents) -> None:
    ones = {"letters": 1.0, "poems": 1.0}
    with (
        closing(open_loader(documents)) as plain,
        closing(open_loader(documents, domain_weights={})) as empty,
        closing(open_loader(documents, domain_weights=ones)) as weighed,
    ):
        assert "domain_weights" not in plain.state_dict()
        n = 2 * plain.sequences_in(0) // 6
        expected = take(plain, n)
        assert torch.equal(take(empty, n), expected)
        assert torch.equal(take(weighed, n), expected)


@given(before=st.integers(0, 60), workers=st.sampled_from([0, 2]))
@settings(max_examples=15, deadline=None)
def test_resuming_a_weighted_mixture_anywhere_equals_not_stopping(
    documents: Documents, before: int, workers: int
) -> None:
    with (
        closing(open_loader(documents, domain_weights=WEIGHTS, workers=workers)) as source,
        closing(open_loader(documents, domain_weights=WEIGHTS)) as resumed,
    ):
        for _ in range(before):
            source.next_batch()
        resumed.load_state_dict(source.state_dict())
        assert resumed.position == source.position
        assert torch.equal(take(resumed, 20), take(source, 20))


@pytest.mark.parametrize(
    ("before", "after"), [(WEIGHTS, {}), ({}, WEIGHTS), (WEIGHTS, {"poems": 2})]
)
def test_a_position_in_another_mixture_is_refused(
    documents: Documents, before: dict[str, float], after: dict[str, float]
) -> None:
    with (
        closing(open_loader(documents, domain_weights=before)) as source,
        closing(open_loader(documents, domain_weights=after)) as other,
        pytest.raises(DataError, match="domain_weights"),
    ):
        other.load_state_dict(source.state_dict())


def test_weights_that_leave_nothing_are_refused(documents: Documents) -> None:
    with pytest.raises(DataError, match="nothing to train on"):
        open_loader(documents, domain_weights={"poems": 0, "letters": 0})


@pytest.mark.parametrize("world_size", [2, 3, 6])
@pytest.mark.parametrize("weights", [{}, WEIGHTS])
def test_processes_together_read_the_batches_of_one(
    documents: Documents, world_size: int, weights: dict[str, float]
) -> None:
    alone = open_loader(documents, domain_weights=weights)
    shares = [
        open_loader(documents, domain_weights=weights, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for _ in range(2 * alone.sequences_in(0) // 6):
        whole, parts = alone.next_batch(), [share.next_batch() for share in shares]
        assert {len(part.tokens) for part in parts} == {6 // world_size}
        assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
        assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)
    assert {share.position for share in shares} == {alone.position}


def test_another_number_of_processes_goes_on(documents: Documents) -> None:
    alone = open_loader(documents)
    pair = [open_loader(documents, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(5):
        alone.next_batch()
        pair[0].next_batch()
    three = [open_loader(documents, rank=rank, world_size=3) for rank in range(3)]
    for share in three:
        share.load_state_dict(pair[0].state_dict())
    for _ in range(5):
        parts = torch.cat([share.next_batch().tokens for share in three])
        assert torch.equal(parts, alone.next_batch().tokens)


@pytest.mark.parametrize("changed", [{"rank": 2, "world_size": 2}, {"rank": -1}, {"world_size": 4}])
def test_a_share_that_cannot_be_is_refused(documents: Documents, changed: dict[str, int]) -> None:
    with pytest.raises(DataError, match=r"rank|share a batch"):
        open_loader(documents, **changed)
