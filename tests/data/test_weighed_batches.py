"""Batches of chats: their weights, and what happens where there is no answer in sight."""

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyper.config import PrepareConfig
from pyper.data import Batch, Documents, Loader, Packing, TokenData, prepare
from pyper.errors import DataError


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Documents:
    """Chats with long questions and short answers: most small batches hold no answer."""
    folder = tmp_path_factory.mktemp("weighed")
    (folder / "in").mkdir()
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"{i} " + "q" * 300},
                {"role": "assistant", "content": f"a{i}"},
            ]
        }
        for i in range(40)
    ]
    (folder / "in" / "talk.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "in" / "prose.txt").write_text("\n".join(f"line {i}" for i in range(300)))
    config = PrepareConfig(tokenizer="bytes", valid_fraction=0.1, test_fraction=0.1)
    prepare([folder / "in"], folder / "out", config)
    return TokenData.open(folder / "out").documents("train")


@pytest.fixture(scope="module")
def talk(documents: Documents) -> Documents:
    return documents.select(np.flatnonzero(documents.domain_index == 1))


def open_loader(documents: Documents, **changed: object) -> Loader:
    chosen = {"seq_len": 20, "batch_size": 4, "random_seed": 3} | changed
    return Loader(documents, **chosen)  # type: ignore[arg-type]


def same(a: Batch, b: Batch) -> bool:
    assert a.weights is not None
    assert b.weights is not None
    return torch.equal(a.tokens, b.tokens) and torch.equal(a.weights, b.weights)


def test_batches_carry_the_weights_of_their_targets(documents: Documents) -> None:
    packing = Packing(documents, seq_len=20, random_seed=3)
    with closing(open_loader(documents, batch_size=30)) as loader:
        batch = loader.next_batch()
    expected = packing.weights(range(30))
    assert expected is not None
    assert batch.weights is not None
    assert batch.weights.dtype == torch.float32
    assert batch.weights.tolist() == expected.tolist()
    assert 0 < batch.weights.sum() < batch.weights.numel()


def test_batches_without_an_answer_are_passed_over(talk: Documents) -> None:
    packing = Packing(talk, seq_len=20, random_seed=3)
    weights = packing.weights(range(packing.n_sequences))
    assert weights is not None
    starts = range(0, packing.n_sequences - 1, 2)
    kept = [s for s in starts if weights[s : s + 2].any()]
    assert len(kept) < len(starts)  # otherwise this shows nothing
    with closing(open_loader(talk, batch_size=2)) as loader:
        for start in kept:
            expected = packing.sequences([start, start + 1])[:, :-1]
            assert loader.next_batch().tokens.tolist() == expected.tolist()
            assert loader.position.sequence == start + 2


@given(before=st.integers(0, 30), workers=st.sampled_from([0, 2]))
@settings(max_examples=15, deadline=None)
def test_resuming_equals_not_stopping(talk: Documents, before: int, workers: int) -> None:
    with (
        closing(open_loader(talk, batch_size=2, workers=workers)) as source,
        closing(open_loader(talk, batch_size=2)) as resumed,
    ):
        for _ in range(before):
            source.next_batch()
        resumed.load_state_dict(source.state_dict())
        assert all(same(source.next_batch(), resumed.next_batch()) for _ in range(5))


def test_processes_pass_over_the_same_batches(talk: Documents) -> None:
    """A process whose own share has no answer still takes part, or the others would wait for it."""
    alone = open_loader(talk)
    pair = [open_loader(talk, rank=rank, world_size=2) for rank in range(2)]
    silent = 0
    for _ in range(30):
        whole, parts = alone.next_batch(), [share.next_batch() for share in pair]
        weights = [part.weights for part in parts if part.weights is not None]
        silent += sum(not w.any() for w in weights)
        assert same(
            Batch(torch.cat([p.tokens for p in parts]), whole.targets, torch.cat(weights)), whole
        )
    assert silent > 0


def test_weights_of_domains_and_of_answers_go_together(documents: Documents) -> None:
    with closing(open_loader(documents, domain_weights={"prose": 0.0})) as loader:
        n = loader.sequences_in(0)
        batch = loader.next_batch()
    chosen = documents.select(np.flatnonzero(documents.domain_index == 1))
    assert n == (chosen.n_tokens - 1) // 20
    assert batch.weights is not None


def test_an_epoch_without_an_answer_is_an_error_and_no_endless_search(talk: Documents) -> None:
    """One window of each document only: the questions."""
    silent = Documents(
        [shard[:100] for shard in talk.shards],
        shard_index=np.zeros(1, np.int32),
        starts=np.zeros(1, np.int64),
        lengths=np.full(1, 100),
        n_bytes=np.full(1, 99),
        domain_index=np.ones(1, np.int16),
        domains=talk.domains,
        fingerprint="silent",
        bos_id=talk.bos_id,
        weights=[np.zeros(len(shard[:100]), np.uint8) for shard in talk.shards],
    )
    with closing(open_loader(silent)) as loader, pytest.raises(DataError, match="nothing to learn"):
        loader.next_batch()


def test_folders_without_chats_have_no_weights_and_say_nothing_of_them(tmp_path: Path) -> None:
    """What was written before there were weights is written the same way."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("".join(f"line {i}\n" for i in range(300)))
    prepare([tmp_path / "in"], tmp_path / "out", PrepareConfig(tokenizer="bytes"))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert set(manifest) == {
        *("version", "tokenizer_fingerprint", "tokenizer_file", "vocab_size", "bos_id", "dtype"),
        *("domains", "counts", "settings", "sources"),
    }
    assert manifest["sources"][0]["split"] is None
    [shard] = manifest["domains"]["a"]["train"]["shards"]
    assert set(shard) == {"documents", "tokens", "tokens_file", "documents_file"}
    assert set(manifest["settings"]) == {
        *("tokenizer", "vocab_size", "valid_fraction", "test_fraction", "min_chars", "split_by"),
        *("text_key", "shard_tokens"),
    }
    assert not {"chats", "refused_chats", "chats_without_answers"} & set(manifest["counts"])
    documents = TokenData.open(tmp_path / "out").documents("train")
    assert documents.weights is None
    with closing(open_loader(documents)) as loader:
        assert loader.next_batch().weights is None
