import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyper.data import Batch, Documents, Loader, LoaderPosition, TokenData
from pyper.data.packing import Packing
from pyper.errors import DataError

SEQ_LEN = 100


@contextmanager
def loader(documents: Documents, **settings: int) -> Iterator[Loader]:
    chosen = {"seq_len": SEQ_LEN, "batch_size": 7, "random_seed": 3, **settings}
    opened = Loader(documents, **chosen)
    try:
        yield opened
    finally:
        opened.close()


def take(source: Loader, n: int) -> torch.Tensor:
    return torch.cat([source.next_batch().tokens for _ in range(n)])


def test_targets_are_the_next_tokens(documents: Documents) -> None:
    with loader(documents) as source:
        batch = source.next_batch()
    assert batch.tokens.shape == batch.targets.shape == (7, SEQ_LEN)
    assert batch.tokens.dtype == torch.int64
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_the_number_of_threads(documents: Documents, workers: int) -> None:
    with loader(documents) as alone, loader(documents, workers=workers) as threaded:
        n = 2 * alone.sequences_in(0) // 7
        assert torch.equal(take(alone, n), take(threaded, n))
        assert alone.position == threaded.position


def test_an_epoch_has_each_sequence_once_and_runs_into_the_next(documents: Documents) -> None:
    with loader(documents) as source:
        per_epoch = source.sequences_in(0)
        assert per_epoch % 7  # otherwise this shows nothing
        rows = take(source, 2 * per_epoch // 7 + 1)[: 2 * per_epoch]
    for epoch in range(2):
        packing = Packing(documents, seq_len=SEQ_LEN, random_seed=3, epoch=epoch)
        expected = torch.from_numpy(packing.sequences(range(per_epoch)))[:, :-1]
        assert torch.equal(rows[epoch * per_epoch : (epoch + 1) * per_epoch], expected)


def test_a_batch_may_be_larger_than_an_epoch(documents: Documents) -> None:
    with loader(documents) as source:
        size = 3 * source.sequences_in(0) + 1
    with loader(documents, batch_size=size) as source:
        assert len(source.next_batch().tokens) == size
        assert source.position == LoaderPosition(3, 1)


@given(before=st.integers(0, 40), workers=st.sampled_from([0, 2]))
@settings(max_examples=20, deadline=None)
def test_resuming_anywhere_equals_not_stopping(
    documents: Documents, before: int, workers: int
) -> None:
    with loader(documents, workers=workers) as source, loader(documents) as resumed:
        for _ in range(before):
            source.next_batch()
        resumed.load_state_dict(source.state_dict())
        assert resumed.position == source.position
        assert torch.equal(take(resumed, 3), take(source, 3))


def test_seeking_back_forgets_what_was_read_ahead(documents: Documents) -> None:
    with loader(documents, workers=2) as source:
        first = take(source, 5)
        source.seek(LoaderPosition(0, 0))
        assert torch.equal(take(source, 5), first)
        source.seek(LoaderPosition(9, 2))
        assert source.position == LoaderPosition(9, 2)


def test_a_resumed_run_may_change_its_batch_size(documents: Documents) -> None:
    with loader(documents) as source, loader(documents, batch_size=3) as smaller:
        source.next_batch()
        smaller.load_state_dict(source.state_dict())
        assert torch.equal(take(smaller, 7), take(source, 3))


@pytest.mark.parametrize("changed", [{"seq_len": 50}, {"random_seed": 4}])
def test_a_position_in_other_data_is_refused(
    data: TokenData, documents: Documents, changed: dict[str, int]
) -> None:
    with loader(documents) as source:
        state = source.state_dict()
    with loader(documents, **changed) as other, pytest.raises(DataError, match=next(iter(changed))):
        other.load_state_dict(state)
    with (
        loader(data.documents("train", ["poems"])) as other,
        pytest.raises(DataError, match="fingerprint"),
    ):
        other.load_state_dict(state)


@pytest.mark.parametrize("position", [LoaderPosition(-1, 0), LoaderPosition(0, 10**9)])
def test_a_position_outside_the_data_is_refused(
    documents: Documents, position: LoaderPosition
) -> None:
    with loader(documents) as source, pytest.raises(DataError, match="no sequence"):
        source.seek(position)


def test_what_a_thread_raises_reaches_the_caller_and_loses_no_batch(
    documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loader(documents) as calm, loader(documents, workers=2) as source:
        expected = take(calm, 2)
        with monkeypatch.context() as patch:
            patch.setattr(Packing, "sequences", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                source.next_batch()
        assert source.position == LoaderPosition(0, 0)
        assert torch.equal(take(source, 2), expected)


def test_reading_ahead_is_bounded(documents: Documents, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    original = Loader._compute
    monkeypatch.setattr(
        Loader, "_compute", lambda self, start: (computed.append(start), original(self, start))[1]
    )
    with loader(documents, workers=2) as source:
        source.next_batch()
        time.sleep(0.05)
        assert len(computed) <= 4


def test_too_little_text_is_refused_at_once(documents: Documents) -> None:
    with pytest.raises(DataError, match="too little"):
        Loader(documents, seq_len=10**7, batch_size=1, random_seed=0, workers=2)


def test_a_batch_splits_into_micro_batches_with_their_weights() -> None:
    tokens = torch.arange(10).reshape(5, 2)
    parts = Batch(tokens, tokens + 1, weights=tokens.float()).split(2)
    assert [len(part.tokens) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.targets for part in parts]), tokens + 1)
    assert parts[2].weights is not None
    assert parts[2].weights.tolist() == [[8.0, 9.0]]
    assert Batch(tokens, tokens).split(5)[0].weights is None


def test_a_batch_moves_as_a_whole() -> None:
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    moved = Batch(tokens, tokens, weights=tokens.float()).to("meta")
    assert {moved.tokens.device.type, moved.targets.device.type} == {"meta"}
    assert moved.weights is not None
    assert moved.weights.device.type == "meta"
