import io
import json
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from small_corpus import make_texts, write_jsonl

from pyper.config import PrepareConfig
from pyper.data import SPLITS, TextTokenizer, TokenData, prepare
from pyper.data.partial_folder import partial_folder
from pyper.data.shard_writer import ShardWriter, token_dtype
from pyper.errors import DataError, StorageError
from pyper.stages.prepare import data_table

BYTES = PrepareConfig(tokenizer="bytes", valid_fraction=0.1, test_fraction=0.1)


def all_texts(data: TokenData) -> list[str]:
    tokenizer = data.tokenizer()
    return [
        tokenizer.decode(documents.tokens(i))
        for documents in map(data.documents, SPLITS)
        for i in range(len(documents))
    ]


def write_lines(path: Path, n: int, word: str = "line") -> str:
    text = "".join(f"{word} {i}\n" for i in range(n))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return text


def test_every_text_comes_back_from_the_shards(corpus: Path, data: TokenData) -> None:
    written = [
        json.loads(line)["text"]
        for path in corpus.iterdir()
        for line in path.read_text().splitlines()
    ]
    assert sorted(all_texts(data)) == sorted(set(written))


def test_one_file_for_each_domain_gives_all_three_splits(tmp_path: Path) -> None:
    texts = {name: write_lines(tmp_path / "in" / f"{name}.txt", 300, name) for name in "ab"}
    manifest = prepare([tmp_path / "in"], tmp_path / "out", BYTES)
    data = TokenData.open(tmp_path / "out", verify=True)
    for name, text in texts.items():
        assert all(manifest.domains[name][split].documents == 1 for split in SPLITS)
        parts = [data.documents(split, [name]).tokens(0) for split in SPLITS]
        assert "".join(map(data.tokenizer().decode, parts)) == text


def test_the_same_text_gives_the_same_fingerprint_anywhere(tmp_path: Path) -> None:
    config = PrepareConfig(vocab_size=300)
    write_lines(tmp_path / "one" / "a.txt", 200)
    shutil.copytree(tmp_path / "one", tmp_path / "two" / "one")
    first = prepare([tmp_path / "one"], tmp_path / "x", config)
    second = prepare([tmp_path / "two" / "one"], tmp_path / "deep" / "y", config)
    assert first.fingerprint == second.fingerprint


def test_a_finished_folder_is_not_made_again(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.txt", 100)
    first = prepare([tmp_path / "in"], tmp_path / "out", BYTES)
    before = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    assert prepare([tmp_path / "in"], tmp_path / "out", BYTES) == first
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == before


def test_other_settings_or_text_do_not_overwrite_a_folder(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.txt", 100)
    prepare([tmp_path / "in"], tmp_path / "out", BYTES)
    with pytest.raises(DataError, match="min_chars changed"):
        prepare([tmp_path / "in"], tmp_path / "out", BYTES.model_copy(update={"min_chars": 2}))
    write_lines(tmp_path / "in" / "a.txt", 101)
    with pytest.raises(DataError, match="the text changed"):
        prepare([tmp_path / "in"], tmp_path / "out", BYTES)


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.txt", 100)
    write_lines(tmp_path / "out" / "thesis.tex", 1)
    with pytest.raises(DataError, match="no data folder"):
        prepare([tmp_path / "in"], tmp_path / "out", BYTES)
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_the_output_may_not_be_inside_a_source(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.txt", 100)
    with pytest.raises(DataError, match="inside the source"):
        prepare([tmp_path], tmp_path / "out", BYTES)


def test_the_training_copy_of_a_held_out_document_is_dropped(tmp_path: Path) -> None:
    for split, texts in {"train": ["x", "y", "x"], "valid": ["x"], "test": ["z"]}.items():
        write_jsonl(tmp_path / "in" / "d" / f"{split}.jsonl", texts)
    manifest = prepare([tmp_path / "in"], tmp_path / "out", BYTES)
    assert {s: manifest.domains["d"][s].documents for s in SPLITS} == {
        "train": 1,
        "valid": 1,
        "test": 1,
    }
    assert (manifest.counts["duplicates"], manifest.counts["documents"]) == (2, 3)


def test_an_empty_domain_is_named_with_counts(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.txt", 100)
    (tmp_path / "in" / "void.txt").write_text("\n")
    with pytest.raises(DataError, match=r"`void` has no documents .*1 empty"):
        prepare([tmp_path / "in"], tmp_path / "out", BYTES)


def test_a_domain_with_test_text_only_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "d" / "test.txt", 10)
    with pytest.raises(DataError, match="no text to train on"):
        prepare([tmp_path / "in"], tmp_path / "out", BYTES)
    assert os.listdir(tmp_path) == ["in"]


def test_a_full_disk_is_a_storage_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "add", full)
    write_lines(tmp_path / "in" / "a.txt", 100)
    with pytest.raises(StorageError, match="No space left"):
        prepare([tmp_path / "in"], tmp_path / "out", BYTES)
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.skipif(os.name != "posix", reason="process numbers are checked on POSIX only")
@pytest.mark.parametrize("name", ["out", "out[1]"])
def test_what_a_killed_run_left_is_removed(tmp_path: Path, name: str) -> None:
    left = tmp_path / f".{name}.partial-{socket.gethostname()}-999999999"
    left.mkdir()
    write_lines(tmp_path / "in" / "a.txt", 100)
    prepare([tmp_path / "in"], tmp_path / name, BYTES)
    assert not left.exists()


def test_a_folder_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    partial = partial_folder(tmp_path / "out")
    (partial.__enter__() / "mine").touch()
    write_lines(tmp_path / "out" / "theirs", 3)
    with pytest.raises(StorageError, match="cannot write") as caught:
        partial.__exit__(None, None, None)
    assert "meanwhile" in caught.value.hint
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "theirs"]


def test_a_given_tokenizer_is_used(tmp_path: Path) -> None:
    TextTokenizer.train_bpe(iter(["line by line " * 30]), 270).save(tmp_path / "t.json")
    write_lines(tmp_path / "in" / "a.txt", 100)
    config = BYTES.model_copy(update={"tokenizer": str(tmp_path / "t.json")})
    manifest = prepare([tmp_path / "in"], tmp_path / "out", config)
    assert TextTokenizer.load(tmp_path / "t.json").fingerprint == manifest.tokenizer_fingerprint


def test_progress_is_reported(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in" / "a.jsonl", make_texts(30, seed=3))
    seen: list[tuple[str, int]] = []
    prepare([tmp_path / "in"], tmp_path / "out", BYTES, progress=lambda *step: seen.append(step))
    assert ("read", 30) in seen
    assert seen[-1][0] == "write"


def test_documents_know_their_domain_length_and_bytes(data: TokenData) -> None:
    documents = data.documents("train")
    assert data.domains == ["letters", "poems"]
    assert len(documents.shards) > 2
    assert documents.n_tokens == data.manifest.total("train").tokens
    assert documents.n_bytes.sum() == data.manifest.total("train").bytes
    # With bytes for tokens, every document is its text and one `bos`.
    np.testing.assert_array_equal(documents.lengths, documents.n_bytes + 1)
    assert list(np.unique(documents.domain_index)) == [0, 1]
    for i in (0, 57, len(documents) - 1):
        tokens = documents.tokens(i)
        assert tokens[0] == documents.bos_id
        assert len(tokens) == documents.lengths[i]
        assert (tokens[1:] != documents.bos_id).all()
        np.testing.assert_array_equal(documents.read(i, 1, 5), tokens[1:5])


def test_a_selection_is_a_view_with_its_own_fingerprint(data: TokenData) -> None:
    documents = data.documents("train")
    chosen = documents.select(np.array([5, 3]))
    assert chosen.shards is documents.shards
    np.testing.assert_array_equal(chosen.tokens(1), documents.tokens(3))
    assert chosen.fingerprint == documents.select(np.array([5, 3])).fingerprint
    assert chosen.fingerprint != documents.select(np.array([3, 5])).fingerprint
    assert chosen.select(np.array([], dtype=np.int64)).n_tokens == 0
    with pytest.raises(DataError, match="out of range"):
        documents.select(np.array([len(documents)]))


def test_domains_can_be_chosen(data: TokenData) -> None:
    assert set(data.documents("train", ["poems"]).domain_index) == {1}
    with pytest.raises(DataError) as caught:
        data.documents("train", ["prose"])
    assert "letters, poems" in caught.value.hint


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_folder_is_noticed(data: TokenData, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(data.path, folder)
    path = folder / "train" / "poems-000.tokens"
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        content[100] ^= 1
        path.write_bytes(content if damage == "flip" else content[:-2])
    with pytest.raises(DataError, match="poems-000"):
        TokenData.open(folder, verify=damage == "flip")


@pytest.mark.parametrize("content", [None, "{", '{"version": 99}'])
def test_a_folder_without_a_good_manifest_is_no_data(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match="manifest") as caught:
        TokenData.open(tmp_path)
    assert "pyper prepare" in caught.value.hint


def test_a_small_vocabulary_takes_two_bytes_a_token() -> None:
    assert (token_dtype(65_536), token_dtype(65_537)) == ("uint16", "uint32")


def test_ids_beyond_two_bytes_survive(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", "d", dtype="uint32", bos_id=0, shard_tokens=1024)
    writer.add(np.array([70_000], dtype=np.uint32), 3)
    entry = writer.close()
    written = np.fromfile(tmp_path / entry.shards[0].tokens_file.name, dtype="<u4")
    assert written.tolist() == [0, 70_000]


def test_the_table_shows_names_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a[bold]b.jsonl").write_text(
        "".join(f'{{"text": "{n} text"}}\n' for n in range(40))
    )
    manifest = prepare([tmp_path / "a[bold]b.jsonl"], tmp_path / "out", BYTES)
    stream = io.StringIO()
    Console(file=stream, width=100).print(data_table(manifest, Path("d[red]")))
    shown = stream.getvalue()
    assert "a[bold]b" in shown
    assert "d[red]:" in shown


@pytest.fixture
def case_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Mac, where `law` is there as soon as `Law` is."""
    exists = Path.exists

    def in_any_case(path: Path) -> bool:
        siblings = [e.name.lower() for e in path.parent.iterdir()] if path.parent.is_dir() else []
        return exists(path) or path.name.lower() in siblings

    monkeypatch.setattr(Path, "exists", in_any_case)


@pytest.mark.usefixtures("case_does_not_count")
@pytest.mark.parametrize("by_column", [False, True])
def test_domains_that_the_file_system_takes_for_one_are_refused(
    tmp_path: Path, by_column: bool
) -> None:
    names = {"Law": make_texts(20, seed=1), "law": make_texts(20, seed=2)}
    if by_column:
        (tmp_path / "in").mkdir()
        records = [{"text": t, "kind": name} for name, texts in names.items() for t in texts]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / "in" / "all.jsonl").write_text(lines)
    else:
        for name, texts in names.items():
            write_jsonl(tmp_path / "in" / name / "a.jsonl", texts)
    config = BYTES.model_copy(update={"columns": {"domain": "kind"} if by_column else {}})
    with pytest.raises(DataError, match="`Law` and `law`") as caught:
        prepare([tmp_path / "in"], tmp_path / "new" / "out", config)
    assert caught.value.hint
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


def test_domains_that_differ_in_case_are_two_where_that_counts(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in" / "Law" / "a.jsonl", make_texts(20, seed=1))
    write_jsonl(tmp_path / "in" / "law" / "a.jsonl", make_texts(20, seed=2))
    if len(list((tmp_path / "in").iterdir())) < 2:
        pytest.skip("this file system does not tell them apart")
    manifest = prepare([tmp_path / "in"], tmp_path / "out", BYTES)
    assert list(manifest.domains) == ["Law", "law"]
