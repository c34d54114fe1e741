"""`pyper import`: a foreign model that writes, is inspected, and is a start for training."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from cli.conftest import Ended
from export.small_stock import save_stock, stock_model
from pyper.errors import TokenizerError
from pyper.mixture import load_mixture
from pyper.stages.start import open_start

Pyper = Callable[..., Ended]
ROWS = 300  # 43 more than the tokenizer has ids


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    model = stock_model("Qwen2", vocab_size=ROWS, num_key_value_heads=2, eos_token_id=[5, 7])
    folder = save_stock(tmp_path / "stock", model, sharded=True)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    return folder


@pytest.fixture
def seed(pyper: Pyper, stock: Path, tmp_path: Path) -> Path:
    ended = pyper("import", stock, "-o", tmp_path / "seed")
    assert ended.exit_code == 0, ended.stderr
    return tmp_path / "seed"


def test_it_says_what_it_imported(pyper: Pyper, stock: Path, tmp_path: Path) -> None:
    facts = json.loads(pyper("import", stock, "-o", tmp_path / "seed", "--check", "--json").stdout)
    assert facts["architecture"] == "Qwen2ForCausalLM"
    assert (facts["vocab_size"], facts["tokens"]) == (ROWS, 257)
    assert (facts["bos"], facts["stop_ids"]) == ("<|bos|>", [5, 7])
    assert facts["chat_template"] is True
    assert facts["check"]["largest_logit_difference"] < 1e-3
    shown = pyper("import", stock, "-o", tmp_path / "seed").stdout
    for words in ("43 rows without a token", "<|bos|>", "64 tokens", "train.start_from"):
        assert words in shown


@pytest.mark.parametrize(
    ("ends", "names", "words"),
    [
        ([66, 0], ["<|bos|>", "A"], "<|bos|> (0), A (66)"),
        ([257, 7, 299], ["\x06", "[/end]", None], "␆ (7), [/end] (257), no token (299)"),
        ([], [], "the same"),
    ],
)
def test_what_ends_a_text_is_named(
    pyper: Pyper, stock: Path, tmp_path: Path, ends: list[int], names: list[str], words: str
) -> None:
    tokenizer = Tokenizer.from_file(str(stock / "tokenizer.json"))
    tokenizer.add_special_tokens(["[/end]"])
    tokenizer.save(str(stock / "tokenizer.json"))
    (stock / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    facts = json.loads(pyper("import", stock, "-o", tmp_path / "seed", "--json").stdout)
    assert (facts["stop_ids"], facts["stop_tokens"]) == (sorted(ends), names)
    shown = pyper("import", stock, "-o", tmp_path / "seed").stdout
    assert words in " ".join(shown.split())


def test_it_writes_and_is_whole(pyper: Pyper, seed: Path) -> None:
    wrote = pyper("generate", seed, "-p", "1 + ", "-n", 20, "--temperature", 2, "--json")
    assert len(json.loads(wrote.stdout)["completions"][0]["tokens"]) > 1
    facts = json.loads(pyper("inspect", seed, "--json").stdout)
    assert (facts["kind"], facts["damaged"]) == ("mixture", [])
    assert (seed / "chat_template.jinja").read_text() == "{{ messages[0].content }}!"


def test_training_goes_on_from_it(
    pyper: Pyper, seed: Path, texts_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    tokenizer = seed / "tokenizer.json"
    ended = pyper("prepare", texts_folder, "-o", data, "--tokenizer", tokenizer)
    assert ended.exit_code == 0, ended.stderr
    settings = {
        "data.path": data,
        "data.seq_len": 16,
        "run.folder": run,
        "train.start_from": seed,
        "train.steps": 2,
        "train.global_batch_tokens": 64,
        "train.learning_rate": 1e-9,
        "train.precision": "fp32",
        "evaluate.tokens": 64,
    }
    (tmp_path / "on.toml").write_text("[mixture]\nn_experts = 1\n")
    options = [f"--set={key}={value}" for key, value in settings.items()]
    for arguments in ([tmp_path / "on.toml", *options], [run]):  # the resolved run opens again
        ended = pyper("train", *arguments)
        assert ended.exit_code == 0, ended.stderr
    before, after = (load_mixture(p)[0].expert(0).state_dict() for p in (seed, run))
    for name, tensor in before.items():
        assert after[name].shape == tensor.shape
        assert (after[name] - tensor).abs().max() < 1e-6
    assert pyper("generate", run, "-p", "1 + ", "-n", 3).exit_code == 0


def test_experts_branch_from_it(
    pyper: Pyper, seed: Path, texts_folder: Path, tmp_path: Path
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    pyper("prepare", texts_folder, "-o", data, "--tokenizer", seed / "tokenizer.json")
    (tmp_path / "two.toml").write_text(
        f"""
        [run]
        folder = "{run}"
        [data]
        path = "{data}"
        seq_len = 16
        [mixture]
        n_experts = 2
        assign = "folder"
        router = "unigram"
        [train]
        start_from = "{seed}"
        steps = 2
        global_batch_tokens = 64
        learning_rate = 1e-9
        precision = "fp32"
        [evaluate]
        tokens = 64
        """
    )
    ended = pyper("train", tmp_path / "two.toml")
    assert ended.exit_code == 0, ended.stderr
    mixture, _ = load_mixture(run)
    assert mixture.settings.experts == ("sums", "tales")
    before = load_mixture(seed)[0].expert(0).state_dict()
    for expert in range(2):
        for name, tensor in mixture.expert(expert).state_dict().items():
            assert (tensor - before[name]).abs().max() < 1e-6
    assert pyper("generate", run, "-p", "1 + ", "-n", 3).exit_code == 0


def test_data_of_another_tokenizer_are_refused(seed: Path) -> None:
    other = "0" * 64
    with pytest.raises(TokenizerError, match="other words") as caught:
        open_start(seed, other)
    assert str(seed / "tokenizer.json") in caught.value.hint


def test_mistakes_are_one_line_and_a_way_out(pyper: Pyper, stock: Path, tmp_path: Path) -> None:
    values = json.loads((stock / "config.json").read_text())
    (stock / "config.json").write_text(json.dumps(values | {"logit_scale": 2.0}))
    ended = pyper("import", stock, "-o", tmp_path / "seed")
    assert ended.exit_code == 1
    assert "`logit_scale`" in ended.complaint[0]
    assert "--ignore-key logit_scale" in ended.complaint[1]
    assert (
        pyper("import", stock, "-o", tmp_path / "s", "--ignore-key", "logit_scale").exit_code == 0
    )
    assert pyper("import", stock).exit_code == 2
    assert pyper("import", tmp_path / "nowhere", "-o", tmp_path / "x").exit_code == 1


def test_help_shows_an_example(pyper: Pyper) -> None:
    shown = pyper("import", "--help").stdout
    assert "pyper import downloads/" in shown
    assert "--ignore-key" in shown
