"""Saved mixtures come back equal, or are refused with a reason."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mixture.small_mixtures import NAMES, small_counts, small_experts, small_router, small_settings
from nn.small_experts import small_expert, text_of
from pyper.checkpoint import read_manifest, write_folder_atomically, write_tensors
from pyper.data import TextTokenizer
from pyper.errors import CheckpointError, TokenizerError
from pyper.mixture import (
    ExpertSource,
    LMRouter,
    Mixture,
    MixtureSettings,
    build_expert,
    find_mixture,
    load_expert,
    load_mixture,
    save_mixture,
)
from pyper.mixture.expert_folder import load_tensors_into, model_tensors
from pyper.mixture.store import read_settings
from pyper.nn import Transformer

TOKENIZER = TextTokenizer.bytes_only()
VOCAB = TOKENIZER.vocab_size


def saved_expert(folder: Path, model: Transformer) -> ExpertSource:
    with write_folder_atomically(folder) as temporary:
        (temporary / "config.json").write_text(model.config.model_dump_json())
        write_tensors(temporary / "model.safetensors", model_tensors(model))
    return ExpertSource(model.config, folder)


def saved_mixture(
    folder: Path, router: str = "unigram", shape: dict[str, Any] | None = None, **changes: Any
) -> Mixture:
    """Write a mixture to `folder / "mixture"`; gives the same one from memory."""
    fingerprint = TOKENIZER.fingerprint
    settings = small_settings(**{"tokenizer_fingerprint": fingerprint, "router": router} | changes)
    experts = small_experts(vocab_size=VOCAB, **shape or {})
    own = small_router(router, 4, VOCAB)
    save_mixture(
        folder / "mixture",
        settings,
        [saved_expert(folder / f"expert{i}", model) for i, model in enumerate(experts)],
        TOKENIZER,
        counts=small_counts(4, VOCAB) if router == "unigram" else None,
        router_models=own.models if isinstance(own, LMRouter) else (),
    )
    return Mixture(settings, [lambda m=m: m for m in experts], own)


def flip_byte(path: Path, at: int = -9) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


def weights_of(folder: Path, index: int) -> Path:
    return folder / "mixture" / f"experts/{index:02d}-{NAMES[index]}" / "model.safetensors"


def text() -> torch.Tensor:
    return text_of(2, 20, vocab_size=VOCAB)


@pytest.mark.parametrize("router", ["unigram", "lm", "experts"])
@pytest.mark.parametrize("mixing", ["posterior", "top1", "window"])
def test_a_saved_mixture_comes_back_equal(tmp_path: Path, router: str, mixing: str) -> None:
    prices = (0.1, -0.2, 0.25, 0.0)
    written = saved_mixture(
        tmp_path, router, mixing=mixing, prices=prices, price_scale=0.5, temperature=0.37
    )
    read, tokenizer = load_mixture(tmp_path / "mixture", resident=1)
    assert read.settings == written.settings
    assert tokenizer.fingerprint == TOKENIZER.fingerprint
    assert torch.equal(read.log_probs(text()), written.log_probs(text()))


@pytest.mark.parametrize(
    "shape",
    [
        {"tie_embeddings": True},
        {"activation": "swiglu", "n_kv_heads": 2, "qk_norm": True},
        {"attention_bias": True, "feed_forward_bias": True},
    ],
)
def test_every_shape_of_expert_comes_back_equal(tmp_path: Path, shape: dict[str, Any]) -> None:
    written = saved_mixture(tmp_path, shape=shape)
    read, _ = load_mixture(tmp_path)
    assert torch.equal(read.log_probs(text()), written.log_probs(text()))
    assert (read.expert(0).head.weight is read.expert(0).embedding.weight) is (
        "tie_embeddings" in shape
    )
    assert not read.expert(0).training


def test_a_bfloat16_expert_stays_bfloat16(tmp_path: Path) -> None:
    model = small_expert().bfloat16()
    source = saved_expert(tmp_path / "expert", model)
    read = load_expert(source.folder, device=torch.device("cpu"))
    assert read.dtype == torch.bfloat16
    assert torch.equal(read(text_of(1, 9)), model(text_of(1, 9)))


def test_weights_take_no_second_place_on_the_disk(tmp_path: Path) -> None:
    saved_mixture(tmp_path)
    assert weights_of(tmp_path, 2).samefile(tmp_path / "expert2" / "model.safetensors")


def test_a_damaged_expert_is_refused_when_it_is_used_and_the_others_work(tmp_path: Path) -> None:
    written = saved_mixture(tmp_path)
    flip_byte(weights_of(tmp_path, 1))
    read, _ = load_mixture(tmp_path)
    for index in (0, 2, 3):
        assert torch.equal(read.expert(index)(text()), written.expert(index)(text()))
    with pytest.raises(CheckpointError, match=r"01-maths/model.safetensors is damaged"):
        read.expert(1)
    with pytest.raises(CheckpointError, match="01-maths"):
        read.log_probs(text())
    assert read.without_expert("maths").log_probs(text()).isfinite().all()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "router.safetensors"])
def test_damage_to_what_all_experts_share_is_refused_at_once(tmp_path: Path, name: str) -> None:
    saved_mixture(tmp_path)
    flip_byte(tmp_path / "mixture" / name)
    with pytest.raises(CheckpointError, match=name):
        load_mixture(tmp_path)


def test_a_damaged_router_model_is_refused_at_once(tmp_path: Path) -> None:
    saved_mixture(tmp_path, "lm")
    flip_byte(tmp_path / "mixture" / "router" / "03" / "model.safetensors")
    with pytest.raises(CheckpointError, match="router/03"):
        load_mixture(tmp_path)


def test_a_missing_expert_is_refused_when_it_is_used(tmp_path: Path) -> None:
    saved_mixture(tmp_path)
    weights_of(tmp_path, 3).unlink()
    read, _ = load_mixture(tmp_path)
    with pytest.raises(CheckpointError, match="missing"):
        read.expert(3)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    saved_mixture(tmp_path, tokenizer_fingerprint="0" * 64)
    with pytest.raises(TokenizerError, match="not the tokenizer of this mixture") as caught:
        load_mixture(tmp_path)
    assert caught.value.hint


def test_experts_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    models = [small_expert(vocab_size=VOCAB), small_expert(vocab_size=300)]
    sources = [saved_expert(tmp_path / str(i), model) for i, model in enumerate(models)]
    settings = small_settings(experts=("law", "verse"), router="experts")
    with pytest.raises(TokenizerError, match="`verse` has a vocabulary of 300") as caught:
        save_mixture(tmp_path / "mixture", settings, sources, TOKENIZER)
    assert "257" in str(caught.value)
    assert not (tmp_path / "mixture").exists()


def test_names_that_are_no_file_names_are_kept(tmp_path: Path) -> None:
    names = ("C++ / headers", "../law", "", "C++ / headers ")
    saved_mixture(tmp_path, experts=names)
    read, _ = load_mixture(tmp_path)
    assert read.settings.experts == names
    assert read.log_probs(text()).isfinite().all()


def test_a_mixture_is_found_in_its_run_or_by_itself(tmp_path: Path) -> None:
    saved_mixture(tmp_path)
    assert find_mixture(tmp_path) == find_mixture(tmp_path / "mixture") == tmp_path / "mixture"
    with pytest.raises(CheckpointError, match="neither a run nor a mixture"):
        find_mixture(tmp_path / "expert0")
    (tmp_path / "expert0" / "run.toml").write_text("")
    with pytest.raises(CheckpointError, match="no mixture yet") as caught:
        find_mixture(tmp_path / "expert0")
    assert "pyper train" in caught.value.hint


def test_an_expert_of_another_mixture_can_be_a_source(tmp_path: Path) -> None:
    written = saved_mixture(tmp_path)
    entry = read_manifest(tmp_path / "mixture").files["experts/02-novels/model.safetensors"]
    source = ExpertSource(written.expert(2).config, weights_of(tmp_path, 2).parent, entry)
    settings = MixtureSettings.model_validate(
        written.settings.model_dump() | {"experts": ("novels",), "router": "experts", "top_k": 1}
    )
    save_mixture(tmp_path / "other", settings, [source], TOKENIZER)
    read, _ = load_mixture(tmp_path / "other")
    assert torch.equal(read.expert(0)(text()), written.expert(2)(text()))


def test_weights_that_do_not_fit_are_refused_by_name() -> None:
    model, tensors = small_expert(), model_tensors(small_expert())
    cpu = torch.device("cpu")
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attention\.q_norm"):
        build_expert(small_expert(qk_norm=True).config, tensors, device=cpu)
    with pytest.raises(CheckpointError, match=r"blocks\.1"):
        build_expert(small_expert(n_layers=1).config, tensors, device=cpu)
    with pytest.raises(CheckpointError, match="size mismatch"):
        load_tensors_into(model, tensors | {"norm.weight": torch.ones(3)})


@pytest.mark.parametrize(
    "size",
    [
        {"d_model": 10**9},
        {"n_layers": 10**9},
        {"vocab_size": 10**12},
        {"d_ff": 10**6},
        {"head_dim": 10**18},
    ],
    ids=str,
)
def test_a_configuration_of_giant_size_is_refused_before_room_is_made(size: dict[str, int]) -> None:
    giant = small_expert().config.model_copy(update=size)
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="far too few"):
        build_expert(giant, model_tensors(small_expert()), device=torch.device("cpu"))
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("seq_len", [10**15, 0])
def test_a_mixture_with_a_context_that_nothing_has_is_refused(tmp_path: Path, seq_len: int) -> None:
    forged = small_settings().model_dump(mode="json") | {"seq_len": seq_len}
    (tmp_path / "config.json").write_text(json.dumps(forged))
    with pytest.raises(CheckpointError, match=f"mixture: `seq_len`: .*, not {seq_len}") as caught:
        read_settings(tmp_path)
    assert caught.value.hint


def test_an_expert_with_a_context_that_nothing_has_is_refused(tmp_path: Path) -> None:
    forged = small_expert().config.model_dump(mode="json") | {"seq_len": 10**15}
    (tmp_path / "config.json").write_text(json.dumps(forged))
    with pytest.raises(CheckpointError, match="not the configuration of an expert"):
        load_expert(tmp_path, device=torch.device("cpu"))


@pytest.mark.parametrize("content", ['{"d_modle": 3}', "[" * 100_000], ids=["unknown", "deep"])
def test_a_folder_without_a_configuration_is_no_expert(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="not the configuration of an expert") as caught:
        load_expert(tmp_path, device=torch.device("cpu"))
    assert caught.value.hint
