"""`pyper export`: folders that load elsewhere, honest refusals, nothing half-written."""

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.conftest import Ended
from nn.small_experts import small_expert
from pyper.data import TextTokenizer
from pyper.mixture import MixtureSettings
from pyper.stages import export as stage
from pyper.stages.merge import save_single

pytestmark = pytest.mark.usefixtures("one_thread")

Pyper = Callable[..., Ended]
BYTES = TextTokenizer.bytes_only()


TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def swiglu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model that has twins everywhere, and came from elsewhere."""
    folder = tmp_path_factory.mktemp("saved") / "llama-like"
    model = small_expert(vocab_size=257, activation="swiglu", seq_len=64)
    settings = MixtureSettings(
        experts=("only",),
        tokenizer_fingerprint=BYTES.fingerprint,
        bos_id=BYTES.bos_id,
        seq_len=64,
        router="experts",
        top_k=1,
        stop_ids=(BYTES.bos_id, 10, 11),
    )
    save_single(folder, model, settings, BYTES)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_a_run_becomes_a_folder_that_says_the_same_elsewhere(
    pyper: Pyper, finished_run: Path, tmp_path: Path
) -> None:
    ended = pyper("export", finished_run, "-o", tmp_path / "out", "--license", "mit", "--json")
    assert ended.exit_code == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert result["architecture"] == "PyperMixtureForCausalLM"
    assert 0 < result["largest_logit_difference"] < 1e-4
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
        *("modeling_pyper_mixture.py", "configuration_pyper_mixture.py", "pyper_layers.py"),
        "pyper_feed_forward.py",
        *("README.md", "MANIFEST.json"),
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| sums |" in card
    assert "| posterior, top2 |" in card
    assert 'license: "mit"' in card


def test_one_expert_has_a_stock_architecture_and_its_own_numbers(
    pyper: Pyper, finished_run: Path, tmp_path: Path
) -> None:
    ended = pyper("export", finished_run, "-o", tmp_path / "out", "--expert", "tales", "--json")
    assert ended.exit_code == 0, ended.stderr
    assert json.loads(ended.stdout)["architecture"] == "ArceeForCausalLM"
    assert not list((tmp_path / "out").glob("*.py"))
    card = (tmp_path / "out" / "README.md").read_text()
    own = json.loads((finished_run / "evaluation.json").read_text())["experts"][1]
    assert f"| this model | {own:.3f} |" in card


def test_a_card_says_what_one_expert_did_differently_and_where_it_began(
    pyper: Pyper, finished_run: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run", symlinks=True)
    settings = (run / "run.toml").read_text().replace("[train]", '[train]\nstart_from = "seeds/x"')
    settings = re.sub(r"(?m)^(seed_fraction|control|expert) = .*\n", "", settings)
    own = '\n[[expert]]\nname = "tales"\ntrain = { learning_rate = 0.125 }\n'
    (run / "run.toml").write_text(settings + own)
    for name, expected in [
        ("tales", "| learning rate | `0.125` |"),
        ("sums", "| learning rate | "),
    ]:
        out = tmp_path / name
        assert pyper("export", run, "-o", out, "--expert", name, "--no-check").exit_code == 0
        card = (out / "README.md").read_text()
        assert expected in card
        assert ("0.125" in card) == (name == "tales")
        assert "| started from | `seeds/x` |" in card
        assert "this one went on with its part" in card
    assert pyper("export", run, "-o", tmp_path / "all", "--no-check").exit_code == 0
    card = (tmp_path / "all" / "README.md").read_text()
    assert "| of expert tales | `learning_rate = 0.125` |" in card


def test_a_model_that_lies_in_a_run_does_not_take_its_numbers(
    pyper: Pyper, finished_run: Path, swiglu: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run", symlinks=True)
    for name in ("mixture", "other"):
        if name == "other":
            shutil.copytree(swiglu, run / name)
        ended = pyper("export", run / name, "-o", tmp_path / name, "--no-check")
        assert ended.exit_code == 0, ended.stderr
        card = (tmp_path / name / "README.md").read_text()
        assert ("nats per token" in card) == (name == "mixture")


def test_the_table_is_for_people(pyper: Pyper, swiglu: Path, tmp_path: Path) -> None:
    ended = pyper("export", swiglu, "-o", tmp_path / "out", "--dtype", "bf16")
    assert ended.exit_code == 0, ended.stderr
    assert "LlamaForCausalLM" in ended.stdout
    assert "largest logit difference" in ended.stdout
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_what_ends_a_text_and_the_chat_template_go_along(
    pyper: Pyper, swiglu: Path, tmp_path: Path
) -> None:
    assert pyper("export", swiglu, "-o", tmp_path / "hf", "--no-check").exit_code == 0
    generation = json.loads((tmp_path / "hf/generation_config.json").read_text())
    assert generation["eos_token_id"] == [BYTES.bos_id, 10, 11]
    assert (tmp_path / "hf/chat_template.jinja").read_text() == TEMPLATE
    assert pyper("export", swiglu, "-o", tmp_path / "gguf", "--to", "gguf").exit_code == 0
    fields = gguf.GGUFReader(tmp_path / "gguf/llama-like-f32.gguf").fields
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 10
    assert fields["tokenizer.chat_template"].contents() == TEMPLATE


def test_gguf_comes_with_its_card(pyper: Pyper, swiglu: Path, tmp_path: Path) -> None:
    ended = pyper("export", swiglu, "--to", "gguf", "--dtype", "fp16", "-o", tmp_path / "out")
    assert ended.exit_code == 0, ended.stderr
    assert (tmp_path / "out" / "llama-like-f16.gguf").is_file()
    assert "llama-cli -m llama-like-f16.gguf" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--to", "gguf"), "a GGUF file holds one model"),
        (("--to", "gguf", "--expert", "tales"), "GELU"),
        (("--to", "onnx"), "`--to` does not know `onnx`"),
        (("--dtype", "int8"), "`--dtype` does not know `int8`"),
        (("--architecture", "stock"), "no stock architecture"),
        (("--architecture", "stok"), "`--architecture` does not know `stok`"),
        (("--expert", "9"), "no expert `9`"),
        (("--mixing", "window"), "window"),
    ],
    ids=str,
)
def test_refusals_say_why_and_leave_nothing(
    options: tuple[str, ...], complaint: str, pyper: Pyper, finished_run: Path, tmp_path: Path
) -> None:
    ended = pyper("export", finished_run, "-o", tmp_path / "out", *options)
    assert ended.exit_code == 1
    assert complaint in ended.complaint[0]
    assert len(ended.complaint) == 2
    assert list(tmp_path.iterdir()) == []


def test_something_else_is_not_overwritten_but_an_export_is(
    pyper: Pyper, swiglu: Path, tmp_path: Path
) -> None:
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter-1.txt").write_text("years of work")
    ended = pyper("export", swiglu, "-o", other, "--no-check")
    assert "no export of Pyper" in ended.complaint[0]
    ended = pyper("export", swiglu, "-o", swiglu, "--no-check")
    assert "no export of Pyper" in ended.complaint[0]
    assert (swiglu / "MANIFEST.json").is_file()
    assert pyper("export", swiglu, "-o", tmp_path / "out", "--no-check").exit_code == 0
    assert pyper("export", swiglu, "-o", tmp_path / "out", "--no-check").exit_code == 0
    assert "file" in pyper("export", swiglu, "-o", other / "chapter-1.txt").complaint[0]


def test_a_folder_that_says_something_else_is_not_kept(
    pyper: Pyper, swiglu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = stage.export_expert

    def write_a_little_wrong(model: Any, folder: Path, *, shard_bytes: int) -> str:
        changed = small_expert(vocab_size=257, activation="swiglu", seq_len=64)
        with torch.no_grad():
            changed.blocks[1].feed_forward.down.weight[0, 0] += 0.1
        return write(changed, folder, shard_bytes=shard_bytes)

    monkeypatch.setattr(stage, "export_expert", write_a_little_wrong)
    ended = pyper("export", swiglu, "-o", tmp_path / "out")
    assert ended.exit_code == 1
    assert "logits differ" in ended.complaint[0]
    assert list(tmp_path.iterdir()) == []


def test_the_rounding_of_large_logits_is_no_difference(pyper: Pyper, tmp_path: Path) -> None:
    model = small_expert(vocab_size=257, activation="swiglu", seq_len=64, tie_embeddings=False)
    with torch.no_grad():
        model.head.weight *= 3000
    settings = MixtureSettings(
        experts=("only",), tokenizer_fingerprint=BYTES.fingerprint, bos_id=BYTES.bos_id,
        seq_len=64, router="experts", top_k=1,
    )  # fmt: skip
    save_single(tmp_path / "loud", model, settings, BYTES)
    ended = pyper("export", tmp_path / "loud", "-o", tmp_path / "out", "--json")
    assert ended.exit_code == 0, ended.stderr
    assert json.loads(ended.stdout)["largest_logit_difference"] > 1e-4


def break_import(folder: Path) -> None:
    layers = folder / "pyper_layers.py"
    layers.write_text(layers.read_text().replace("import torch\n", "import pyper, torch\n"))


def lose_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["decoder.norm.weight"]  # transformers would make one up
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "named"), [(break_import, "pyper"), (lose_a_weight, "decoder.norm.weight")]
)
def test_a_folder_that_does_not_load_as_it_should_is_not_kept(
    damage: Callable[[Path], None],
    named: str,
    pyper: Pyper,
    swiglu: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = stage.export_single

    def write_damaged(model: Any, folder: Path, *, shard_bytes: int) -> str:
        name = write(model, folder, shard_bytes=shard_bytes)
        damage(folder)
        return name

    monkeypatch.setattr(stage, "export_single", write_damaged)
    ended = pyper("export", swiglu, "-o", tmp_path / "out", "--architecture", "pyper")
    assert "transformers cannot load" in ended.complaint[0]
    assert named in ended.complaint[0]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_known_before_anything_is_written(
    pyper: Pyper, swiglu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    ended = pyper("export", swiglu, "-o", tmp_path / "out", "--no-check")
    assert ended.exit_code == 1
    assert "needed, 1.0 kB free" in ended.complaint[0]
    assert list(tmp_path.iterdir()) == []


def test_without_transformers_the_extra_is_named_before_work_begins(
    pyper: Pyper, swiglu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ended = pyper("export", swiglu, "-o", tmp_path / "out")
    assert "--no-check" in ended.complaint[0]
    assert "pyper[export]" in ended.complaint[1]
    assert pyper("export", swiglu, "-o", tmp_path / "out", "--no-check").exit_code == 0


def test_nonsense_is_no_model(pyper: Pyper, tmp_path: Path) -> None:
    assert "neither a run nor a mixture" in pyper("export", tmp_path, "-o", "x").complaint[0]


def test_help_has_an_example(pyper: Pyper) -> None:
    ended = pyper("export", "--help")
    assert ended.exit_code == 0
    assert "pyper export runs/quickstart" in ended.stdout
