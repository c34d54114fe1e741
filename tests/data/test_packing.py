import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyper.data import Documents, Packing
from pyper.errors import DataError
from pyper.nn.documents import document_ids, positions

BOS = 0


def documents_of(lengths: list[int], n_shards: int = 1) -> Documents:
    """Documents whose tokens after `bos` all differ: 1, 2, 3 …, dealt out to shards in runs."""
    shard_index = np.arange(len(lengths)) * n_shards // max(1, len(lengths))
    numbers = iter(range(1, sum(lengths) + 1))
    shards, starts = [], np.zeros(len(lengths), dtype=np.int64)
    for shard in range(n_shards):
        tokens: list[int] = []
        for i in np.flatnonzero(shard_index == shard):
            starts[i] = len(tokens)
            tokens += [BOS, *(next(numbers) for _ in range(lengths[i] - 1))]
        shards.append(np.array(tokens, dtype=np.uint32))
    return Documents(
        shards,
        shard_index=shard_index.astype(np.int32),
        starts=starts,
        lengths=np.array(lengths, dtype=np.int64),
        n_bytes=np.array(lengths, dtype=np.int64),
        domain_index=np.zeros(len(lengths), dtype=np.int16),
        domains=["d"],
        fingerprint="f",
        bos_id=BOS,
    )


def obvious_windows(documents: Documents, seq_len: int) -> list[list[int]]:
    stream = [int(t) for i in range(len(documents)) for t in documents.tokens(i)]
    return [
        stream[start : start + seq_len + 1] for start in range(0, len(stream) - seq_len, seq_len)
    ]


def test_windows_of_very_many_documents_are_the_stream_cut() -> None:
    documents = documents_of([1, 2, 5] * 200, n_shards=3)
    packing = Packing(documents, seq_len=500, random_seed=0, shuffle=False)
    assert packing.sequences(range(packing.n_sequences)).tolist() == obvious_windows(documents, 500)


lengths_lists = st.lists(st.integers(1, 30), min_size=1, max_size=120)


@given(lengths=lengths_lists, seq_len=st.integers(1, 90), n_shards=st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_unshuffled_windows_are_the_stream_cut(
    lengths: list[int], seq_len: int, n_shards: int
) -> None:
    documents = documents_of(lengths, n_shards)
    expected = obvious_windows(documents, seq_len)
    if not expected:
        with pytest.raises(DataError):
            Packing(documents, seq_len=seq_len, random_seed=0, shuffle=False)
        return
    packing = Packing(documents, seq_len=seq_len, random_seed=0, shuffle=False)
    assert packing.n_sequences == len(expected)
    assert packing.sequences(range(packing.n_sequences)).tolist() == expected


@given(
    lengths=lengths_lists,
    seq_len=st.integers(1, 90),
    n_shards=st.integers(1, 3),
    epoch=st.integers(0, 5),
)
@settings(max_examples=150, deadline=None)
def test_every_token_is_a_target_once_but_the_first_and_the_rest(
    lengths: list[int], seq_len: int, n_shards: int, epoch: int
) -> None:
    n_tokens = sum(lengths)
    if n_tokens <= seq_len:
        return
    documents = documents_of(lengths, n_shards)
    packing = Packing(documents, seq_len=seq_len, random_seed=7, epoch=epoch)
    windows = packing.sequences(np.arange(packing.n_sequences))
    targets = windows[:, 1:]
    others = targets[targets != BOS]
    assert targets.size == (n_tokens - 1) // seq_len * seq_len
    assert len(np.unique(others)) == len(others)
    # Inside a document the tokens follow one another, whatever the order of documents.
    inside = (windows[:, :-1] != BOS) & (targets != BOS)
    assert (targets[inside] == windows[:, :-1][inside] + 1).all()


def test_epochs_and_seeds_differ_and_repeat() -> None:
    documents = documents_of([5] * 60)

    def windows(random_seed: int, epoch: int) -> list[list[int]]:
        packing = Packing(documents, seq_len=8, random_seed=random_seed, epoch=epoch)
        return packing.sequences(range(packing.n_sequences)).tolist()

    assert windows(1, 0) == windows(1, 0)
    assert windows(1, 0) != windows(1, 1)
    assert windows(1, 0) != windows(2, 0)


def test_the_shuffle_is_the_same_on_every_machine_and_release() -> None:
    packing = Packing(documents_of([4] * 6), seq_len=4, random_seed=1, epoch=2)
    expected = [
        [0, 7, 8, 9, 0],
        [0, 16, 17, 18, 0],
        [0, 13, 14, 15, 0],
        [0, 10, 11, 12, 0],
        [0, 4, 5, 6, 0],
    ]
    assert packing.sequences(range(packing.n_sequences)).tolist() == expected


def test_one_sequence_is_a_row_of_many() -> None:
    packing = Packing(documents_of([5] * 60), seq_len=8, random_seed=1)
    np.testing.assert_array_equal(packing.sequence(3), packing.sequences([1, 3])[1])


def test_too_little_text_is_refused_with_counts() -> None:
    with pytest.raises(DataError, match="2 documents with 8 tokens"):
        Packing(documents_of([4, 4]), seq_len=8, random_seed=0)


def test_a_sequence_out_of_range_is_refused() -> None:
    packing = Packing(documents_of([5] * 10), seq_len=8, random_seed=0)
    with pytest.raises(IndexError):
        packing.sequences([packing.n_sequences])


def test_positions_restart_at_every_document() -> None:
    tokens = torch.tensor([[5, 6, BOS, 7, BOS, BOS], [BOS, 1, 2, 3, 4, 5]])
    assert document_ids(tokens, BOS).tolist() == [[0, 0, 1, 1, 2, 3], [1, 1, 1, 1, 1, 1]]
    assert positions(tokens, BOS).tolist() == [[0, 1, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5]]
