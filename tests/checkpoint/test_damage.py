import json
import os
import random
from pathlib import Path

import pytest
from small_checkpoints import save

from pyper.checkpoint import CheckpointStore, verify_manifest, write_manifest
from pyper.errors import CheckpointError

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"]


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_noticed_and_the_previous_checkpoint_loads(
    name: str, tmp_path: Path
) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    path = save(store, 2) / name
    content = path.read_bytes()
    chance = random.Random(name)
    for bit in chance.sample(range(8 * len(content)), min(60, 8 * len(content))):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        _expect_previous(store)
    path.write_bytes(content)
    assert store.load(path.parent).step == 2


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_is_noticed(name: str, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    path = save(store, 2) / name
    content = path.read_bytes()
    lengths = random.Random(name).sample(range(len(content)), min(20, len(content)))
    for damaged in [*(content[:n] for n in lengths), content + b"\0", content + b" "]:
        path.write_bytes(damaged)
        _expect_previous(store)
    path.unlink()
    _expect_previous(store)


def _expect_previous(store: CheckpointStore) -> None:
    store.warnings.clear()
    latest = store.load_latest()
    assert latest is not None
    assert latest.step == 1
    assert len(store.warnings) == 1
    assert "step-0000002" in store.warnings[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"abc")
    (folder / "inner/b.bin").write_bytes(b"")
    write_manifest(folder, {"note": "ü"})
    return folder


def test_a_manifest_lists_all_files_and_keeps_notes(folder: Path) -> None:
    manifest = verify_manifest(folder)
    assert sorted(manifest.files) == ["a.bin", "inner/b.bin"]
    assert manifest.files["a.bin"].size == 3
    assert manifest.metadata == {"note": "ü"}


def test_a_needed_file_that_is_not_listed_is_named(folder: Path) -> None:
    (folder / "c.bin").write_bytes(b"late")
    verify_manifest(folder)
    with pytest.raises(CheckpointError, match=r"does not list `c\.bin`"):
        verify_manifest(folder, only=["a.bin", "c.bin"])


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "inner/../../secret", "", "a\\b"])
def test_paths_out_of_the_folder_are_refused(name: str, folder: Path) -> None:
    (folder.parent / "secret").write_bytes(b"abc")
    _forge(folder, lambda files: {**files, name: files["a.bin"]})
    with pytest.raises(CheckpointError, match="not inside its folder"):
        verify_manifest(folder)


def _forge(folder: Path, change) -> None:
    """A manifest with a right hash of its own, as somebody with bad intentions would make."""
    from pyper.checkpoint.manifest import Manifest, _serialise, read_manifest

    manifest = read_manifest(folder)
    forged = Manifest(change(manifest.files), manifest.metadata)
    (folder / "MANIFEST.json").write_bytes(_serialise(forged))


def test_links_are_refused_when_reading_and_when_writing(folder: Path) -> None:
    os.rename(folder / "a.bin", folder.parent / "a.bin")
    (folder / "a.bin").symlink_to(folder.parent / "a.bin")
    for action in (verify_manifest, write_manifest):
        with pytest.raises(CheckpointError, match="symbolic link"):
            action(folder)


def test_a_linked_folder_inside_is_refused(folder: Path) -> None:
    os.rename(folder / "inner", folder.parent / "inner")
    (folder / "inner").symlink_to(folder.parent / "inner")
    with pytest.raises(CheckpointError, match="symbolic link"):
        verify_manifest(folder)


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b'{"version": 1}', b"[" * 100_000, b"\xff\xfe", b"\0" * 50]
)
def test_something_else_in_place_of_the_manifest_is_a_clear_error(
    content: bytes, folder: Path
) -> None:
    (folder / "MANIFEST.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json is damaged"):
        verify_manifest(folder)


def test_a_newer_version_says_so(folder: Path) -> None:
    raw = json.loads((folder / "MANIFEST.json").read_text())
    (folder / "MANIFEST.json").write_text(json.dumps(raw | {"version": 2}))
    with pytest.raises(CheckpointError, match="has version 2") as caught:
        verify_manifest(folder)
    assert "another version of Pyper" in caught.value.hint
