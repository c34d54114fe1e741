import errno
import json
import os
from collections import namedtuple
from pathlib import Path

import pytest
from small_checkpoints import run_python, save, start_python

from pyper.checkpoint import (
    CheckpointStore,
    sweep,
    verify_manifest,
    write_folder_atomically,
    write_json_atomically,
)
from pyper.errors import StorageError

# Kills itself at the n-th call of one function of `os`, once for each folder named
# FUNCTION-n-STEP. One process forks them all: importing torch takes longer than dying.
KILLS = """
def dying(original, n):
    calls = iter(range(1, 1000))
    def call(*args, **kwargs):
        if next(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    return call

for folder in sorted(Path(sys.argv[1]).iterdir()):
    child = os.fork()
    if child == 0:
        function, n, step = folder.name.split("-")
        setattr(os, function, dying(getattr(os, function), int(n)))
        store = CheckpointStore(folder, keep_last=1)
        store.save(int(step), weights, state, {"position": 2}, best=step == "2")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, folder
"""
FAILPOINTS = {
    "fsync-1-2": 1,  # the files are written, nothing is on the disk
    "fsync-5-2": 1,  # the manifest is being flushed
    "rename-1-2": 1,  # complete, but not in place
    "fsync-7-2": 2,  # in place
    "symlink-1-2": 2,  # before `best`
    "replace-1-2": 2,
    "rename-2-2": 2,  # pruning the previous one
    "rename-1-1": 1,  # writing the only step again: before the old one is set aside
    "rename-2-1": 1,  # and while no folder has its name
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per failpoint: step 1 was saved, then a process died while saving."""
    root = tmp_path_factory.mktemp("killed")
    for name in FAILPOINTS:
        save(CheckpointStore(root / name), 1, best=True)
    assert run_python(KILLS, root) == (0, "")
    return root


def hidden(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_a_kill_inside_a_save_leaves_a_checkpoint(failpoint: str, killed: Path) -> None:
    folder = killed / failpoint
    store = CheckpointStore(folder, keep_last=1)
    latest = store.load_latest()
    assert latest is not None
    assert latest.step == FAILPOINTS[failpoint]
    assert store.warnings == []
    assert store.load_best() is not None
    assert hidden(folder / "checkpoints") == []  # the dead writer's folder is gone
    save(store, 3, best=True)
    assert store.steps() == [3]


def test_a_full_disk_at_any_size_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    save(store, 1)
    body = """
    import resource
    from pyper.errors import StorageError
    for limit in (0, 1, 9, 100, 1000, 4000, 4100, 4150):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            store.save(2, weights, state, {"long": "x" * 4200})
        except StorageError as error:
            assert "cannot write" in error.message and "free" in error.message, error.message
            assert error.hint
        else:
            raise SystemExit("saved within " + str(limit))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        assert os.listdir(store.folder / "checkpoints") == ["step-0000001"]
        assert store.load_latest().step == 1
    """
    assert run_python(body, tmp_path) == (0, "")
    assert store.steps() == [1]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("function", ["fsync", "rename"])
def test_complaints_of_the_system_become_storage_errors(
    number: int, function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(StorageError, match=os.strerror(number)) as caught:
            save(store, 2)
        assert caught.value.hint
    assert store.steps() == [1]
    assert hidden(tmp_path / "checkpoints") == []


def test_too_little_space_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9, 50_000))
    store = CheckpointStore(tmp_path)
    with pytest.raises(StorageError, match=r"101\.5 kB needed, 50\.0 kB free"):
        save(store, 1)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_files_are_flushed_before_the_rename_and_the_manifest_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append("temporary" if path.name.startswith(".tmp") else path.name)
        fsync(descriptor)

    def record_rename(source: Path, target: Path) -> None:
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    with write_folder_atomically(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
    assert events == ["a", "temporary", "MANIFEST.json", "temporary", "rename", tmp_path.name]


def test_a_folder_appears_only_when_its_block_succeeds(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), write_folder_atomically(tmp_path / "out") as folder:
        (folder / "a").write_text(str(1 / 0))
    assert list(tmp_path.iterdir()) == []
    with write_folder_atomically(tmp_path / "out", metadata={"n": 1}) as folder:
        assert not (tmp_path / "out").exists()
        (folder / "a").write_text("a")
    assert verify_manifest(tmp_path / "out").metadata == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_existing_folder_stays_when_its_successor_fails(tmp_path: Path) -> None:
    with write_folder_atomically(tmp_path / "out") as folder:
        (folder / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), write_folder_atomically(tmp_path / "out") as folder:
        raise ZeroDivisionError
    assert (tmp_path / "out/a").read_text() == "old"
    with write_folder_atomically(tmp_path / "out") as folder:
        (folder / "b").write_text("new")
    assert [p.name for p in (tmp_path / "out").iterdir() if p.suffix == ""] == ["b"]
    assert hidden(tmp_path) == []


def test_a_live_writer_is_not_swept_away_and_a_dead_one_is(tmp_path: Path) -> None:
    writer = start_python(
        """
        import time
        from pyper.checkpoint import write_folder_atomically
        with write_folder_atomically(Path(sys.argv[1]) / "out"):
            print("ready", flush=True)
            time.sleep(60)
        """,
        tmp_path,
    )
    sweep(tmp_path)
    assert len(hidden(tmp_path)) == 1
    writer.kill()
    writer.communicate()
    sweep(tmp_path)
    assert hidden(tmp_path) == []


def test_json_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep/run.json"
    write_json_atomically(path, {"a": [1, "ü"]})
    with pytest.raises(TypeError):
        write_json_atomically(path, {"a": {1}})  # type: ignore[dict-item]
    assert json.loads(path.read_text()) == {"a": [1, "ü"]}
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]


def test_a_folder_without_permission_says_what_to_do(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="Permission denied"):
        save(CheckpointStore(tmp_path), 1)
    tmp_path.chmod(0o700)
