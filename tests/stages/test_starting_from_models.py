"""`train.start_from`: training that goes on from a saved model."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sparse_runs import open_quietly, sparse_run
from torch import Tensor

from pyper.checkpoint import (
    FileEntry,
    hash_file,
    load_checkpoint,
    manifest,
    read_manifest,
    read_tensors,
    write_folder_atomically,
    write_tensors,
)
from pyper.config import PrepareConfig, RunConfig
from pyper.data import prepare
from pyper.errors import CheckpointError, ConfigError, PyperError, TokenizerError
from pyper.stages.context import Context
from pyper.stages.pipeline import run_pipeline, train_only
from pyper.stages.start import open_start
from pyper.train.freeze import part_of

pytestmark = pytest.mark.usefixtures("one_thread")

_WEIGHTS = "model.safetensors"

Finished = Callable[[str], Path]
NewRun = Callable[..., RunConfig]


def going_on(start: Path, folder: Path, data: Path, **train: Any) -> RunConfig:
    """A run file with no `[model]`, two steps at a rate of almost nothing."""
    values = {"start_from": str(start), "steps": 2, "learning_rate": 1e-9} | train
    run = sparse_run("sparse", folder, data)
    raw = run.model_dump(mode="json", exclude_none=True)
    raw.pop("model")
    raw.pop("mixture")
    kept = {k: v for k, v in raw["train"].items() if k not in ("control", "seed_fraction")}
    return RunConfig.model_validate(raw | {"train": kept | values})


def best_of(folder: Path) -> dict[str, Tensor]:
    return load_checkpoint(folder / "best").model


@pytest.mark.parametrize("name", ["sparse", "token_mixture", "token_choice"])
@pytest.mark.parametrize("place", ["", "mixture", "mixture/experts/00-model", "experts/00/best"])
def test_training_begins_at_the_saved_weights_and_thresholds(
    finished_sparse: Finished, name: str, place: str, data_folder: Path, tmp_path: Path
) -> None:
    folder = finished_sparse(name)
    context = open_quietly(going_on(folder / place, tmp_path / "on", data_folder))
    assert context.model == open_start(folder / place, _tokenizer_of(context)).config
    assert context.model.sparse is not None
    train_only(context, ["expert:0"])

    before, after = best_of(folder / "experts" / "00"), best_of(tmp_path / "on" / "experts" / "00")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        if key.endswith("threshold_updates"):
            assert int(after[key]) == int(tensor) + (2 if name != "token_choice" else 0)
        elif not key.endswith(("threshold_total", "balance_bias")):
            torch.testing.assert_close(after[key], tensor, rtol=0, atol=1e-6)


def _tokenizer_of(context: Context) -> str:
    return context.data.manifest.tokenizer_fingerprint


@pytest.mark.parametrize("place", ["mixture/experts/01-tales", "control/best", "seed/best"])
def test_one_expert_of_several_or_a_control_can_be_gone_on_from(
    finished_run: Path, place: str, data_folder: Path, tmp_path: Path
) -> None:
    run = going_on(finished_run / place, tmp_path / "on", data_folder)
    report = run_pipeline(open_quietly(run))
    assert report["control"] is None
    assert "routing" not in report
    assert report["steps"] == {"expert:0": 2}


def test_the_numbers_of_a_routed_model_are_reported_again(
    finished_sparse: Finished, data_folder: Path, tmp_path: Path
) -> None:
    run = going_on(finished_sparse("sparse"), tmp_path / "on", data_folder)
    (routing,) = run_pipeline(open_quietly(run))["routing"]
    assert routing["leak_gap"] is not None


def test_frozen_parts_keep_every_bit(
    finished_sparse: Finished, data_folder: Path, tmp_path: Path
) -> None:
    frozen = ["feed_forward", "embedding"]
    folder = finished_sparse("sparse")
    run = going_on(folder, tmp_path / "on", data_folder, freeze=frozen, learning_rate=1e-2)
    train_only(open_quietly(run), ["expert:0"])
    before, after = best_of(folder / "experts" / "00"), best_of(tmp_path / "on" / "experts" / "00")
    for key in (key for key in before if ".state." not in key):
        assert torch.equal(before[key], after[key]) is (part_of(key) in frozen), key


@pytest.mark.parametrize("place", ["", "mixture", "mixture/experts/00-model"])
def test_another_tokenizer_is_refused(
    finished_sparse: Finished, texts_folder: Path, place: str, tmp_path: Path
) -> None:
    prepare([texts_folder], tmp_path / "bpe", PrepareConfig(vocab_size=300))
    start = finished_sparse("sparse") / place
    with pytest.raises(TokenizerError, match="another tokenizer") as caught:
        open_quietly(going_on(start, tmp_path / "on", tmp_path / "bpe"))
    _is_one_line_with_a_way_out(caught.value, "--tokenizer")


def test_a_checkpoint_of_another_tokenizer_is_refused_though_its_vocabulary_is_as_large(
    finished_run: Path, texts_folder: Path, tmp_path: Path
) -> None:
    values = json.loads((finished_run / "mixture" / "tokenizer.json").read_text())
    vocab = values["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    swapped = tmp_path / "swapped.json"
    swapped.write_text(json.dumps(values))
    prepare([texts_folder], tmp_path / "data", PrepareConfig(tokenizer=str(swapped)))
    for place in ("seed/best", "experts/00/best"):
        with pytest.raises(TokenizerError, match="another tokenizer") as caught:
            open_quietly(going_on(finished_run / place, tmp_path / "on", tmp_path / "data"))
        _is_one_line_with_a_way_out(caught.value, "mixture/tokenizer.json")


def test_a_checkpoint_far_from_its_run_is_compared_by_its_vocabulary(
    finished_run: Path, data_folder: Path, texts_folder: Path, tmp_path: Path
) -> None:
    prepare([texts_folder], tmp_path / "bpe", PrepareConfig(vocab_size=300))
    alone = shutil.copytree(finished_run / "seed" / "best", tmp_path / "alone")
    open_quietly(going_on(alone, tmp_path / "same", data_folder))
    with pytest.raises(TokenizerError, match="257") as caught:
        open_quietly(going_on(alone, tmp_path / "on", tmp_path / "bpe"))
    _is_one_line_with_a_way_out(caught.value, "")


def _is_one_line_with_a_way_out(error: PyperError, way_out: str) -> None:
    assert "\n" not in error.message
    assert error.hint
    assert way_out in error.hint


def with_other_weights(mixture: Path, folder: Path, change: str) -> Path:
    """A copy whose hashes are right, and whose weights are not those of its shape."""
    weights = next(mixture.glob("experts/*/model.safetensors")).relative_to(mixture)
    metadata = read_manifest(mixture).metadata
    with write_folder_atomically(folder, metadata=metadata) as made:
        shutil.copytree(mixture, made, dirs_exist_ok=True)
        (made / "MANIFEST.json").unlink()
        tensors = {k: t.clone() for k, t in read_tensors(mixture / weights).items()}
        if change == "narrow":
            tensors["norm.weight"] = tensors["norm.weight"][:-1].clone()
        else:
            tensors.pop(change)
        write_tensors(made / weights, tensors)
    return folder


@pytest.mark.parametrize("change", ["embedding.weight", "norm.weight", "narrow", "damage"])
def test_weights_that_do_not_fit_are_refused_before_the_run_has_a_folder(
    finished_sparse: Finished, data_folder: Path, tmp_path: Path, change: str
) -> None:
    good = finished_sparse("sparse") / "mixture"
    if change == "damage":
        bad = Path(shutil.copytree(good, tmp_path / "bad"))
        file = next(bad.glob("experts/*/model.safetensors"))
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        bad = with_other_weights(good, tmp_path / "bad", change)
    with pytest.raises(CheckpointError) as caught:
        open_quietly(going_on(bad, tmp_path / "on", data_folder))
    _is_one_line_with_a_way_out(caught.value, "")
    assert str(bad) in caught.value.message
    assert not (tmp_path / "on").exists()
    train_only(open_quietly(going_on(good, tmp_path / "on", data_folder)), ["expert:0"])


def test_a_mixture_of_several_names_one_of_them(
    finished_run: Path, data_folder: Path, tmp_path: Path
) -> None:
    for place in (finished_run, finished_run / "mixture"):
        with pytest.raises(ConfigError, match="a mixture of 2 experts, not one model") as caught:
            open_quietly(going_on(place, tmp_path / "on", data_folder))
        _is_one_line_with_a_way_out(caught.value, "experts/00-sums")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("model", "d_model", 32), ("model", "kind", "dense"), ("data", "seq_len", 32)],
)
def test_another_shape_is_refused(
    finished_sparse: Finished,
    data_folder: Path,
    tmp_path: Path,
    section: str,
    key: str,
    value: object,
) -> None:
    run = going_on(finished_sparse("sparse"), tmp_path / "on", data_folder)
    raw = run.model_dump(mode="json", exclude_none=True, exclude={"model"})
    raw[section] = raw.get(section, {}) | {key: value}
    with pytest.raises(ConfigError, match=f"`{section}.{key}` is") as caught:
        open_quietly(RunConfig.model_validate(raw))
    _is_one_line_with_a_way_out(caught.value, "")


def test_what_is_no_model_is_refused(data_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "experts" / "empty").mkdir(parents=True)
    for place in (tmp_path / "nowhere", data_folder, tmp_path / "experts" / "empty"):
        with pytest.raises(CheckpointError) as caught:
            open_quietly(going_on(place, tmp_path / "on", data_folder))
        _is_one_line_with_a_way_out(caught.value, "")


@pytest.mark.parametrize("place", ["mixture", "mixture/experts/00-model", "experts/00/best"])
def test_damaged_weights_are_refused(
    finished_sparse: Finished, place: str, data_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished_sparse("sparse"), tmp_path / "copy", symlinks=True)
    run = going_on(folder / place, tmp_path / "on", data_folder)
    (file,) = (folder / place).resolve().rglob("model.safetensors")
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.unlink()  # the mixture and the checkpoint share it
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        train_only(open_quietly(run), ["expert:0"])
    assert not (tmp_path / "on").exists()


@pytest.mark.parametrize("place", ["mixture", "experts/00/best"])
def test_weights_are_read_once_for_the_check_and_for_all_that_begins_with_them(
    finished_sparse: Finished,
    place: str,
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start, hashed = finished_sparse("sparse") / place, []

    def hash_and_remember(path: Path) -> FileEntry:
        hashed.append(path)
        return hash_file(path)

    monkeypatch.setattr(manifest, "hash_file", hash_and_remember)
    # the sweep of learning rates begins at these weights many times
    run = going_on(start, tmp_path / "on", data_folder, learning_rate="auto")
    train_only(open_quietly(run), ["expert:0"])
    weights = [p for p in hashed if p.is_relative_to(start.resolve()) and p.name == _WEIGHTS]
    assert len(weights) == 1


@pytest.mark.parametrize("place", ["mixture", "experts/00/best"])
def test_weights_that_change_after_the_check_are_refused_as_damaged(
    finished_sparse: Finished, place: str, data_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished_sparse("sparse"), tmp_path / "copy", symlinks=True)
    context = open_quietly(going_on(folder / place, tmp_path / "on", data_folder))
    (file,) = (folder / place).resolve().rglob(_WEIGHTS)
    with file.open("r+b") as opened:  # in its place: what was mapped changes with it
        opened.seek(-9, os.SEEK_END)
        (byte,) = opened.read(1)
        opened.seek(-9, os.SEEK_END)
        opened.write(bytes([byte ^ 1]))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        train_only(context, ["expert:0"])


@pytest.mark.parametrize("train", [{"control": True}, {"seed_fraction": 0.5}])
def test_a_seed_or_a_control_beside_it_is_refused(
    data_folder: Path, tmp_path: Path, train: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="takes the place of a seed") as caught:
        going_on(tmp_path, tmp_path / "on", data_folder, **train)
    assert "control" in caught.value.hint
