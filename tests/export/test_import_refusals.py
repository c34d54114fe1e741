"""Folders that are damaged or hostile are refused by name and in time, and others are not."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.small_stock import imported, save_stock, stock_model
from pyper.errors import CheckpointError, ConfigError, PyperError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    return save_stock(tmp_path / "stock", stock_model("Llama", num_key_value_heads=2))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save_stock(tmp_path / "sharded", stock_model("Llama"), sharded=True)


def change(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes one out."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def config_is_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[1, 2]")


def config_is_deep(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


def config_is_binary(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")


def config_has_many_layers(folder: Path) -> None:
    change(folder / "config.json", num_hidden_layers=10**9)


def config_has_one_layer_more(folder: Path) -> None:
    change(folder / "config.json", num_hidden_layers=4)


def config_has_wide_layers(folder: Path) -> None:
    change(folder / "config.json", intermediate_size=2**30, hidden_size=2**30)


def weights_are_cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def weights_are_noise(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 8)


def weights_are_empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def a_tensor_is_missing(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.__delitem__("model.layers.1.mlp.up_proj.weight"))


def the_head_is_missing(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.__delitem__("lm_head.weight"))


def a_tensor_is_too_many(folder: Path) -> None:
    edit_tensors(
        folder,
        lambda t: t.update(
            {"model.layers.0.self_attn.q_norm.weight": t["model.norm.weight"].clone()}
        ),
    )


def a_tensor_is_misshapen(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"model.norm.weight": torch.ones(17)}))


def a_tensor_is_eight_bit(folder: Path) -> None:
    key = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(folder, lambda t: t.update({key: t[key].to(torch.float8_e4m3fn)}))


def a_weight_is_nan(folder: Path) -> None:
    edit_tensors(
        folder, lambda t: t["model.layers.2.mlp.down_proj.weight"][3, 3:4].fill_(torch.nan)
    )


def weights_are_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def there_are_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def there_is_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def there_is_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def tokenizer_is_noise(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": 3}')


def table_is_too_short(folder: Path) -> None:
    change(folder / "config.json", vocab_size=200)
    edit_tensors(
        folder,
        lambda t: t.update(
            {k: t[k][:200].clone() for k in ("model.embed_tokens.weight", "lm_head.weight")}
        ),
    )


def generation_config_is_a_list(folder: Path) -> None:
    (folder / "generation_config.json").write_text("[]")


def template_is_no_text(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff\xff")


HOSTILE: list[tuple[Callable[[Path], None], str]] = [
    (config_is_a_list, "no JSON object but a list"),
    (config_is_deep, "config.json"),
    (config_is_binary, "config.json"),
    (config_has_many_layers, "num_hidden_layers"),
    (config_has_one_layer_more, "says 4 layers .*, the weights have 3"),
    (config_has_wide_layers, "model.embed_tokens.weight"),
    (weights_are_cut, "no usable safetensors"),
    (weights_are_noise, "no usable safetensors"),
    (weights_are_empty, "no usable safetensors"),
    (a_tensor_is_missing, r"model\.layers\.1\.mlp\.up_proj\.weight"),
    (the_head_is_missing, "lm_head"),
    (a_tensor_is_too_many, "q_norm"),
    (a_tensor_is_misshapen, r"`model\.norm\.weight` is 17, config\.json makes it 16"),
    (a_tensor_is_eight_bit, "quantized"),
    (a_weight_is_nan, r"model\.layers\.2\.mlp\.down_proj\.weight.*not finite"),
    (weights_are_pickles, "execute code"),
    (there_are_no_weights, "neither"),
    (there_is_no_config, "no config.json"),
    (there_is_no_tokenizer, "no tokenizer.json"),
    (tokenizer_is_noise, "not a tokenizer.json"),
    (table_is_too_short, "200 rows"),
    (generation_config_is_a_list, "generation_config.json"),
    (template_is_no_text, "chat template"),
]


@pytest.mark.parametrize(("damage", "words"), HOSTILE, ids=[d.__name__ for d, _ in HOSTILE])
def test_a_hostile_folder_is_refused_in_words_and_in_time(
    damage: Callable[[Path], None], words: str, stock: Path, tmp_path: Path
) -> None:
    damage(stock)
    begun = time.monotonic()
    with pytest.raises(PyperError, match=words) as caught:
        imported(stock, tmp_path / "seed")
    assert time.monotonic() - begun < 5
    assert caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["stock"]  # nothing half written stays


@pytest.mark.parametrize(
    ("change_map", "words"),
    [
        (lambda m: m | {"model.norm.weight": "../sharded/x.safetensors"}, "outside the folder"),
        (lambda m: m | {"model.norm.weight": "/etc/passwd"}, "outside the folder"),
        (lambda m: m | {"model.norm.weight": "a\0b"}, "outside the folder"),
        (lambda m: m | {"model.norm.weight": 7}, "outside the folder"),
        (lambda m: m | {"model.norm.weight": "model-9.safetensors"}, "is missing"),
        (lambda m: m | {"model.other.weight": next(iter(m.values()))}, "model.other.weight"),
        (lambda m: {}, "no `weight_map`"),
        (lambda m: [1], "no `weight_map`"),
    ],
)
def test_an_index_that_leads_nowhere_is_refused(
    change_map: Callable[[Any], Any], words: str, sharded: Path, tmp_path: Path
) -> None:
    values = json.loads((sharded / INDEX).read_text())
    values["weight_map"] = change_map(values["weight_map"])
    (sharded / INDEX).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=words):
        imported(sharded, tmp_path / "seed")


def test_a_link_to_a_file_elsewhere_is_as_downloads_keep_them(
    sharded: Path, tmp_path: Path
) -> None:
    store = tmp_path / "blobs"
    store.mkdir()
    for number, file in enumerate(sharded.glob("*.safetensors")):
        file.rename(store / str(number))
        file.symlink_to(store / str(number))
    assert imported(sharded, tmp_path / "seed")["parameters"] > 0


def test_a_tied_head_may_be_there_again_but_not_be_another(tmp_path: Path) -> None:
    stock = save_stock(tmp_path / "stock", stock_model("Llama", tie_word_embeddings=True))
    table = load_file(stock / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(stock, lambda t: t.update({"lm_head.weight": table.clone()}))
    imported(stock, tmp_path / "seed")
    edit_tensors(stock, lambda t: t.update({"lm_head.weight": table + 1}))
    with pytest.raises(CheckpointError, match="differs"):
        imported(stock, tmp_path / "other")


def test_what_can_be_computed_may_be_saved(stock: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(stock, lambda t: t.update({name: torch.ones(2)}))
    imported(stock, tmp_path / "seed")


def test_other_folders_are_not_overwritten(stock: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    for output in (tmp_path / "full", stock):
        with pytest.raises(ConfigError):
            imported(stock, output)
    imported(stock, tmp_path / "seed")
    imported(stock, tmp_path / "seed")  # a mixture may be replaced


def test_unknown_options_are_refused(stock: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--dtype") as caught:
        imported(stock, tmp_path / "seed", dtype="bf61")
    assert "bf16" in caught.value.hint
    with pytest.raises(CheckpointError, match="no folder"):
        imported(tmp_path / "nowhere", tmp_path / "seed")


def test_a_narrow_type_that_overflows_is_refused(stock: Path, tmp_path: Path) -> None:
    edit_tensors(stock, lambda t: t["lm_head.weight"][0, :1].fill_(1e6))
    with pytest.raises(CheckpointError, match=r"`lm_head\.weight` holds values that are not"):
        imported(stock, tmp_path / "seed", dtype="fp16")
