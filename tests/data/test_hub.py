"""Data sets by name: what is a name, what is asked of the hub, and what is said without one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pyper.config import PrepareConfig
from pyper.data import TokenData, prepare
from pyper.data.hub import HubName, HubSplit, find_splits, parse_name
from pyper.errors import DataError

pytest.importorskip("datasets")
huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`owner/name`, which the library finds on this disk; the hub is only asked for its commit."""
    (tmp_path / "owner" / "name").mkdir(parents=True)
    for split, n in (("train", 40), ("test", 5)):
        lines = [json.dumps({"text": f"{split} row {i}", "kind": "ab"[i % 2]}) for i in range(n)]
        (tmp_path / "owner" / "name" / f"{split}.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda self, name: SimpleNamespace(sha="abc123")
    )


def test_all_splits_are_found_or_the_one_that_was_named(named: None) -> None:
    everything = find_splits(HubName("owner/name"))
    assert [(s.name.config, s.name.split) for s in everything] == [
        ("default", "train"),
        ("default", "test"),
    ]
    assert {s.commit for s in everything} == {"abc123"}
    assert find_splits(HubName("owner/name", None, "test")) == everything[1:]


@pytest.mark.parametrize(
    ("name", "there"),
    [
        (HubName("owner/name", None, "trian"), "train, test"),
        (HubName("owner/name", "fr"), "default"),
    ],
)
def test_what_is_there_is_named(named: None, name: HubName, there: str) -> None:
    with pytest.raises(DataError, match=r"has no (split|config)") as caught:
        find_splits(name)
    assert there in caught.value.hint


def test_a_named_data_set_is_prepared_like_any_other(named: None, tmp_path: Path) -> None:
    config = PrepareConfig.model_validate({"tokenizer": "bytes", "columns": "domain=kind"})
    manifest = prepare([Path("hf:owner/name")], tmp_path / "out", config)
    data = TokenData.open(tmp_path / "out", verify=True)
    assert data.domains == ["a", "b"]
    assert data.documents("test").n_documents == 5
    assert [(s.name, s.split) for s in manifest.sources] == [
        ("hf:owner/name/default:test", "test"),
        ("hf:owner/name/default:train", "train"),
    ]
    assert prepare([Path("hf:owner/name")], tmp_path / "out", config) == manifest


def test_another_commit_is_another_text(named: None) -> None:
    name = HubName("owner/name", "default", "train")
    assert HubSplit(name, "abc").sha256() != HubSplit(name, "abd").sha256()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf:owner/name", HubName("owner/name")),
        ("hf:owner/name:train", HubName("owner/name", None, "train")),
        ("hf:owner/name/config", HubName("owner/name", "config")),
        ("hf:o-1/n.2/de_DE:train_sft", HubName("o-1/n.2", "de_DE", "train_sft")),
    ],
)
def test_names_of_data_sets(text: str, expected: HubName) -> None:
    assert parse_name(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text", ["hf:", "hf:name", "hf:a/b/c/d", "hf:../../etc", "hf:a/b:", "hf:a/b c", "hf:/a/b"]
)
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="not the name of a data set"):
        parse_name(text)


def test_offline_a_named_data_set_is_an_error_in_words(tmp_path: Path) -> None:
    """In a process of its own: the library reads its settings once."""
    code = (
        "import sys; from pathlib import Path; from pyper.config import PrepareConfig\n"
        "from pyper.data import prepare; from pyper.errors import DataError\n"
        "try: prepare([Path('hf:owner/name:train')], Path('out'), PrepareConfig())\n"
        "except DataError as error: print(error.message, '|', error.hint)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
        check=False,
    )
    assert done.stdout.startswith("cannot read hf:owner/name:train: "), done.stderr
    assert "offline, name a folder" in done.stdout
    assert not (tmp_path / "out").exists()
