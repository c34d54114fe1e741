"""Experts dropped from and added to a mixture, without training."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pyper.config import PrepareConfig
from pyper.data import prepare
from pyper.errors import CheckpointError, ConfigError, PyperError, TokenizerError
from pyper.mixture import load_mixture
from pyper.mixture.store import read_settings
from pyper.stages.change import change_mixture
from pyper.stages.context import Context
from pyper.stages.inspect import inspect_path
from pyper.stages.pipeline import run_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")


def expert_weights(folder: Path, index: int) -> dict[str, torch.Tensor]:
    return dict(load_mixture(folder)[0].expert(index).state_dict())


def test_a_dropped_expert_is_gone_and_the_other_the_same(
    finished_run: Path, tmp_path: Path
) -> None:
    change_mixture(finished_run, tmp_path / "new", ["sums"], [])

    settings = read_settings(tmp_path / "new")
    assert (settings.experts, settings.top_k, settings.prices) == (("tales",), 1, ())
    before = expert_weights(finished_run / "mixture", 1)
    after = expert_weights(tmp_path / "new", 0)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert inspect_path(tmp_path / "new")["damaged"] == []


def test_an_added_expert_writes_beside_the_old_ones(finished_run: Path, tmp_path: Path) -> None:
    settings = change_mixture(finished_run, tmp_path / "new", [], [f"more={finished_run}:1"])

    assert settings.experts == ("sums", "tales", "more")
    ours, theirs = expert_weights(tmp_path / "new", 2), expert_weights(finished_run / "mixture", 1)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    mixture, _ = load_mixture(tmp_path / "new")
    assert mixture.settings.n_experts == 3


def test_an_expert_of_another_tokenizer_is_refused(
    finished_run: Path,
    texts_folder: Path,
    open_new: Callable[..., Context],
    tmp_path: Path,
) -> None:
    prepare([texts_folder], tmp_path / "bpe", PrepareConfig(vocab_size=300))
    run_pipeline(open_new("other", f"data.path={tmp_path / 'bpe'}", "train.control=false"))

    with pytest.raises(TokenizerError, match="another tokenizer") as caught:
        change_mixture(finished_run, tmp_path / "new", [], [f"more={tmp_path / 'other'}:0"])

    assert "--tokenizer" in caught.value.hint
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("drop", "add", "error", "words"),
    [
        (["law"], [], CheckpointError, "no expert `law`"),
        (["sums", "tales"], [], CheckpointError, "at least one expert"),
        ([], ["more"], ConfigError, "NAME=RUN:EXPERT"),
        ([], ["more=run:x"], ConfigError, "NAME=RUN:EXPERT"),
        ([], ["more=nowhere:0"], CheckpointError, "nowhere"),
    ],
)
def test_what_cannot_be_changed_is_said(
    finished_run: Path,
    tmp_path: Path,
    drop: list[str],
    add: list[str],
    error: type[PyperError],
    words: str,
) -> None:
    with pytest.raises(error, match=words) as caught:
        change_mixture(finished_run, tmp_path / "new", drop, add)
    assert caught.value.hint
    assert not (tmp_path / "new").exists()


def test_a_changed_mixture_needs_a_folder(finished_run: Path) -> None:
    with pytest.raises(ConfigError, match="write a new mixture"):
        change_mixture(finished_run, None, ["sums"], [])


def test_a_name_can_be_taken_once(finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(PyperError, match="sums"):
        change_mixture(finished_run, tmp_path / "new", [], [f"sums={finished_run}:1"])
