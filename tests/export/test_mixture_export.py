"""A mixture in `transformers` says, and writes, what it does here."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from export.small_exports import (
    BYTES,
    CACHE,
    PROMPTS,
    generate_without_pyper,
    greedy_by_engine,
    greedy_elsewhere,
    left_padded,
    logits_of,
    open_elsewhere,
    stepwise_logits,
)
from export.small_stock import transformers
from mixture.small_mixtures import (
    MODES,
    ROUTERS,
    loaders_of,
    small_mixture,
    small_router,
    small_settings,
)
from nn.small_experts import small_expert, text_of
from pyper.config import SparseConfig
from pyper.errors import ConfigError
from pyper.export.hf_tokenizer import export_tokenizer
from pyper.export.mixture_hf import export_mixture
from pyper.generate import SamplingConfig, complete
from pyper.mixture import Mixture

pytestmark = pytest.mark.usefixtures("one_thread")

EXPORTED = [mode for mode in MODES if mode["mixing"] != "window"]


def exported(mixture: Mixture, folder: Path, **options: Any) -> Any:
    folder.mkdir()
    export_mixture(mixture, folder, shard_bytes=1 << 30)
    return open_elsewhere(folder, **options)


def some_text(rows: int = 3, length: int = 30) -> Tensor:
    tokens = text_of(rows, length)
    tokens[:, 0] = 0
    return tokens


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("mode", EXPORTED)
def test_logits_are_the_log_probabilities_of_the_mixture(
    router: str, mode: dict[str, Any], tmp_path: Path
) -> None:
    mixture, tokens = small_mixture(router, **mode), some_text()
    model = exported(mixture, tmp_path / "out")
    expected = mixture.log_probs(tokens)
    torch.testing.assert_close(logits_of(model, tokens), expected, atol=1e-5, rtol=0)
    # Without pruning, a token at a time is the same.
    torch.testing.assert_close(stepwise_logits(model, tokens), expected, atol=1e-5, rtol=0)


def test_prices_and_other_shapes_of_experts_are_exported(tmp_path: Path) -> None:
    sparse = SparseConfig(n_experts=3, routing="token_choice")
    experts = [
        small_expert(0, std=0.4),
        small_expert(1, std=0.4, tie_embeddings=True, activation="swiglu", n_kv_heads=1),
        small_expert(2, std=0.4, qk_norm=True, n_layers=1, attend_across_documents=False),
        small_expert(3, std=0.4, kind="sparse", sparse=sparse),
    ]
    settings = small_settings(
        mixing="top1", router="unigram", prices=(0.0, 0.1, -0.1, 0.05), price_scale=0.7
    )
    mixture = Mixture(settings, loaders_of(experts), small_router("unigram"))
    model, tokens = exported(mixture, tmp_path / "out"), some_text(32)
    torch.testing.assert_close(
        logits_of(model, tokens), mixture.log_probs(tokens), atol=1e-5, rtol=0
    )
    free = Mixture(settings.model_copy(update={"prices": ()}), loaders_of(experts), mixture.router)
    assert not torch.allclose(free.log_probs(tokens), mixture.log_probs(tokens), atol=1e-2)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("mode", EXPORTED)
def test_greedy_text_is_that_of_the_engine(
    router: str, mode: dict[str, Any], tmp_path: Path
) -> None:
    # Pruning is on: the engine drops experts for good while it writes.
    mixture = small_mixture(router, vocab_size=257, **mode | {"prune": 0.05})
    model = exported(mixture, tmp_path / "out")
    expected = greedy_by_engine(mixture, PROMPTS, 20)
    assert len({tuple(row) for row in expected}) == len(PROMPTS)
    assert greedy_elsewhere(model, PROMPTS, 20) == expected
    assert greedy_elsewhere(model, [""], 20) == expected[-1:]  # from the document token alone


def count_tokens(model: Any) -> list[int]:
    """What each expert will have read, as it grows."""
    read = [0] * len(model.experts)

    def count(number: int, n_tokens: int) -> None:
        read[number] += n_tokens

    for number, expert in enumerate(model.experts):
        expert.embedding.register_forward_pre_hook(
            lambda _, args, number=number: count(number, args[0].numel())
        )
    return read


def test_experts_that_become_unlikely_stop_running(tmp_path: Path) -> None:
    mixture = small_mixture("experts", top_k=2, temperature=1.0, prune=0.4, vocab_size=257)
    model = exported(mixture, tmp_path / "out")
    read = count_tokens(model)
    assert greedy_elsewhere(model, ["abc"], 20) == greedy_by_engine(mixture, ["abc"], 20)
    assert min(read) < 8 < 20 < max(read)


def test_equal_shares_are_no_reason_to_drop_an_expert(tmp_path: Path) -> None:
    mixture = small_mixture(top_k=2, temperature=0.01, prune=0.49, vocab_size=257)
    model = exported(mixture, tmp_path / "out")
    assert greedy_elsewhere(model, [""], 20) == greedy_by_engine(mixture, [""], 20)


def test_after_the_prefix_one_expert_runs(tmp_path: Path) -> None:
    model = exported(small_mixture(mixing="top1", vocab_size=257), tmp_path / "out")
    read = count_tokens(model)
    [written] = greedy_elsewhere(model, ["abcdefgh"], 12)
    prompt, rest = 9, len(written) - 1  # the last token is not read
    assert sorted(read) == [prompt, prompt, prompt, prompt + rest]


def test_later_tokens_do_not_change_earlier_logits(tmp_path: Path) -> None:
    model, tokens = exported(small_mixture(top_k=4), tmp_path / "out"), some_text()
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 5) % 17
    before, after = logits_of(model, tokens), logits_of(model, changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])


@pytest.mark.parametrize("mode", EXPORTED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(mode: dict[str, Any], side: str, tmp_path: Path) -> None:
    model, tokens = exported(small_mixture("lm", **mode), tmp_path / "out"), some_text(2, 20)
    fill = torch.full((2, 6), 3)
    padded = torch.cat([fill, tokens] if side == "left" else [tokens, fill], dim=1)
    mask = torch.ones_like(padded)
    mask[:, slice(0, 6) if side == "left" else slice(20, 26)] = 0
    got = logits_of(model, padded, attention_mask=mask)
    got = got[:, 6:] if side == "left" else got[:, :20]
    torch.testing.assert_close(got, logits_of(model, tokens), atol=1e-5, rtol=0)


def test_labels_give_the_loss_of_the_mixture_and_gradients(tmp_path: Path) -> None:
    mixture, tokens = small_mixture(), some_text()
    model = exported(mixture, tmp_path / "out")
    loss = model(input_ids=tokens, labels=tokens).loss
    said = mixture.log_probs(tokens)[:, :-1].gather(-1, tokens[:, 1:, None])
    torch.testing.assert_close(loss, -said.mean(), atol=1e-5, rtol=0)
    loss.backward()
    assert all(p.grad is not None for p in model.experts.parameters())


@pytest.mark.parametrize("mode", EXPORTED)
def test_beams_take_the_cache_with_them(mode: dict[str, Any], tmp_path: Path) -> None:
    model = exported(small_mixture("lm", vocab_size=257, **mode), tmp_path / "out")
    with_cache, without = (
        greedy_elsewhere(model, PROMPTS, 16, num_beams=3, use_cache=cached)
        for cached in (True, False)
    )
    assert with_cache == without


def test_a_text_goes_on_from_its_cache(tmp_path: Path) -> None:
    model = exported(small_mixture(vocab_size=257, prune=0.05), tmp_path / "out")
    options = {"do_sample": False, "return_dict_in_generate": True}
    first = model.generate(**left_padded(PROMPTS[:2]), max_new_tokens=6, **options)
    mask = left_padded(PROMPTS[:2])["attention_mask"]
    more = model.generate(
        first.sequences,
        attention_mask=torch.cat([mask, mask.new_ones(2, 6)], dim=1),
        max_new_tokens=6,
        **{CACHE: getattr(first, CACHE)},
        **options,
    )
    whole = model.generate(**left_padded(PROMPTS[:2]), max_new_tokens=12, **options)
    assert torch.equal(more.sequences, whole.sequences)


def test_a_saved_copy_has_its_modelling_file(tmp_path: Path) -> None:
    model, tokens = exported(small_mixture("lm"), tmp_path / "out"), some_text()
    model.save_pretrained(tmp_path / "copy")
    copy = open_elsewhere(tmp_path / "copy")
    assert torch.equal(logits_of(copy, tokens), logits_of(model, tokens))
    top1 = open_elsewhere(tmp_path / "copy", mixing="top1", prefix_tokens=3)
    assert not torch.equal(logits_of(top1, tokens), logits_of(model, tokens))


def test_the_folder_needs_no_pyper(tmp_path: Path, modules: Path) -> None:
    mixture = small_mixture("lm", mixing="top1", vocab_size=257)
    folder = tmp_path / "out"
    folder.mkdir()
    export_mixture(mixture, folder, shard_bytes=1 << 30)
    got = generate_without_pyper(folder, left_padded(PROMPTS), 12, modules)
    assert got == greedy_by_engine(mixture, PROMPTS, 12)


def test_a_pipeline_writes_the_text_of_the_engine(tmp_path: Path) -> None:
    mixture = small_mixture(vocab_size=257, prune=0.01)
    model = exported(mixture, tmp_path / "out")
    export_tokenizer(BYTES, tmp_path / "out", seq_len=48, chat_template=None)
    sampling = SamplingConfig(max_new_tokens=12, temperature=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        write = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
        prompts, options = list(PROMPTS[:3]), {"max_new_tokens": 12, "return_full_text": False}
        batch = write(prompts, batch_size=3, do_sample=False, **options)
    expected = [completion.text for completion in complete(mixture, BYTES, prompts, sampling)]
    assert [row[0]["generated_text"] for row in batch] == expected


def test_shards_and_bfloat16_keep_the_router_in_float32(tmp_path: Path) -> None:
    mixture, folder = small_mixture(mixing="top1"), tmp_path / "out"
    folder.mkdir()
    export_mixture(mixture, folder, shard_bytes=4000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    model = open_elsewhere(folder, dtype=torch.bfloat16)
    assert model.experts[0].head.weight.dtype == torch.bfloat16
    assert torch.equal(model.unigram.log_probs, mixture.router.log_probs)  # type: ignore[union-attr]


def test_window_mixing_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="window") as error:
        export_mixture(small_mixture(mixing="window"), tmp_path, shard_bytes=1 << 30)
    assert "--mixing" in error.value.hint
