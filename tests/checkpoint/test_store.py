import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_checkpoints import run_python, save
from torch import nn

from pyper.checkpoint import (
    CheckpointStore,
    load_model_tensors,
    read_tensors,
    same_state,
    write_tensors,
)
from pyper.errors import CheckpointError

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def test_every_type_and_shape_comes_back_bitwise_and_others_can_read_it(tmp_path: Path) -> None:
    tensors = {f"{d}": (torch.randn(3, 5) * 9).to(d) for d in DTYPES}
    tensors |= {
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "transposed": torch.randn(4, 6).T,
        "every other": torch.arange(10)[::2],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "needs grad": nn.Parameter(torch.randn(2)),
        "ключ": torch.ones(1),
    }
    written = write_tensors(tmp_path / "t.safetensors", tensors)
    assert written.size == (tmp_path / "t.safetensors").stat().st_size
    for back in (read_tensors(tmp_path / "t.safetensors"), load_file(tmp_path / "t.safetensors")):
        assert back.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert back[name].dtype == tensor.dtype
            assert back[name].shape == tensor.shape
            assert _bits(back[name]) == _bits(tensor)


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_a_checkpoint_comes_back_with_its_metadata(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, metadata={"config": "abc"})
    path = save(store, 400)
    assert path == tmp_path / "checkpoints" / "step-0000400"
    assert sorted(p.name for p in path.iterdir()) == [
        "MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip
    loaded = CheckpointStore(tmp_path).load_latest()
    assert loaded is not None
    assert loaded.step == 400
    assert (loaded.model["w"] == 400).all()
    assert (loaded.optimizer["exp_avg"] == 400).all()
    assert loaded.state == {"position": 400}
    assert loaded.metadata["config"] == "abc"
    assert loaded.metadata["torch"] == torch.__version__
    assert loaded.metadata["threads"] == torch.get_num_threads()


def test_tied_names_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    shared = torch.ones(4)
    store = CheckpointStore(tmp_path)
    with pytest.raises(CheckpointError, match="`a` and `b` share memory"):
        store.save(1, {"a": shared, "b": shared}, {}, {})
    with pytest.raises(CheckpointError, match="complex64"):
        store.save(1, {"a": torch.zeros(1, dtype=torch.complex64)}, {}, {})
    with pytest.raises(CheckpointError, match="not JSON"):
        store.save(1, {}, {}, {"a": {1, 2}})  # type: ignore[dict-item]
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert store.load_latest() is None


def test_slices_of_one_buffer_are_not_tied(tmp_path: Path) -> None:
    buffer = torch.arange(8)
    write_tensors(tmp_path / "t.safetensors", {"a": buffer[:4], "b": buffer[4:]})
    assert read_tensors(tmp_path / "t.safetensors")["b"].tolist() == [4, 5, 6, 7]


def test_the_last_and_the_best_stay(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    for step in (2, 10, 30, 100, 1000):
        save(store, step, best=step == 10)
    assert store.steps() == [10, 100, 1000]
    assert os.readlink(tmp_path / "best") == "checkpoints/step-0000010"
    best = store.load_best()
    assert best is not None
    assert best.step == 10
    save(store, 2000, best=True)
    assert store.steps() == [1000, 2000]
    assert store.latest_step() == 2000
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")]


def test_order_is_by_step_whatever_the_clock_says(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    for step in (99_999_999, 100_000_000, 100_000_001):  # more digits than the name pads to
        path = save(store, step)
        os.utime(path, (4e9 - step * 10, 4e9 - step * 10))
    assert store.steps() == [100_000_000, 100_000_001]
    latest = store.load_latest()
    assert latest is not None
    assert latest.step == 100_000_001


def test_a_run_set_back_keeps_what_it_writes(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    save(store, 200)
    save(store, 400)
    (tmp_path / "checkpoints/step-0000400/state.json").write_text("{}")
    save(store, 300)
    latest = store.load_latest()
    assert latest is not None
    assert latest.step == 300
    assert "step-0000400/state.json is damaged" in store.warnings[0]
    assert store.steps() == [200, 300, 400]  # the damaged one does not count as one of the last


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 5)
    store.save(5, {"w": torch.zeros(2)}, {}, {})
    latest = store.load_latest()
    assert latest is not None
    assert latest.model["w"].tolist() == [0.0, 0.0]


def test_no_checkpoint_is_none_but_only_damaged_ones_are_an_error(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run")
    assert store.load_latest() is None
    assert store.load_best() is None
    assert store.latest_step() is None
    path = save(store, 1, best=True)
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        store.load_latest()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        store.load_best()


def test_an_explicit_path_never_falls_back(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    path = save(store, 2)
    (path / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
        store.load(path)
    with pytest.raises(CheckpointError, match="no folder"):
        store.load(tmp_path / "step-9")


def test_a_run_folder_can_be_moved(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path / "old"), 3, best=True)
    shutil.move(tmp_path / "old", tmp_path / "new")
    best = CheckpointStore(tmp_path / "new").load_best()
    assert best is not None
    assert best.step == 3


def test_the_weights_alone_load_without_the_rest(tmp_path: Path) -> None:
    path = save(CheckpointStore(tmp_path), 3)
    (path / "optimizer.safetensors").unlink()
    before = (path / "model.safetensors").read_bytes()
    weights = load_model_tensors(path)
    weights["w"].zero_()  # mapped, but writing does not reach the file
    assert (path / "model.safetensors").read_bytes() == before
    assert (load_model_tensors(path, verify=False)["w"] == 3).all()
    (path / "model.safetensors").write_bytes(before[:-1] + b"\x77")
    with pytest.raises(CheckpointError, match="sha256"):
        load_model_tensors(path)


def test_loaded_tensors_do_not_depend_on_the_files(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    path = save(store, 3)
    loaded = store.load(path)
    with (path / "model.safetensors").open("r+b") as file:
        file.truncate(0)  # reading a mapping of it would now be a bus error
    assert same_state(loaded.model["w"], torch.full((300,), 3.0))


def test_nothing_in_a_checkpoint_is_unpickled(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path), 3)
    body = """
    seen = []
    sys.addaudithook(lambda event, _: seen.append(event))
    assert store.load_latest().step == 3
    assert not {"pickle.find_class", "exec", "compile", "socket.connect"} & set(seen), set(seen)
    """
    assert run_python(body, tmp_path) == (0, "")
