"""Which models can guess for another one (`--draft`), and which are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from generate.test_speculation import AlwaysOn
from mixture.small_mixtures import small_router
from pyper.data import TextTokenizer
from pyper.errors import CheckpointError, ConfigError, TokenizerError
from pyper.generate import (
    BatchEngine,
    Drafter,
    EngineLimits,
    Request,
    RouterDrafter,
    SamplingConfig,
)
from pyper.stages.draft import open_drafter
from pyper.stages.write import OpenModel, open_model


def opened(folder: Path) -> OpenModel:
    return open_model(folder, expert=None, mixing=None, resident=None, device="cpu")


def drafter_of(draft: str, model: OpenModel) -> Drafter:
    return open_drafter(draft, model.mixture, model.tokenizer, torch.device("cpu"))


def written(model: OpenModel, drafter: Drafter | None) -> tuple[list[int | None], int]:
    """Tokens after a short prompt, and how many of them had been guessed."""
    engine = BatchEngine(model.mixture, model.tokenizer, EngineLimits(), drafter=drafter)
    engine._payoff = AlwaysOn()
    prompt = (model.tokenizer.bos_id, *model.tokenizer.encode("1: "))
    engine.submit(Request(prompt, SamplingConfig(12, 0.0)))
    tokens = []
    while not engine.idle:
        tokens += [event.token for event in engine.step()]
    return tokens, engine.stats().accepted_tokens


@pytest.mark.parametrize("place", ["mixture/experts/01-tales", "seed/best", "experts/00/best"])
def test_an_expert_or_a_checkpoint_inside_its_run_can_guess(finished_run: Path, place: str) -> None:
    model = opened(finished_run)
    tokens, accepted = written(model, drafter_of(str(finished_run / place), model))
    assert tokens == written(model, None)[0]
    assert accepted > 0


@pytest.mark.parametrize("name", ["sparse", "token_mixture"])
@pytest.mark.parametrize("place", ["", "mixture"])
def test_a_model_of_one_can_guess_whatever_is_in_its_layers(
    finished_sparse: Callable[[str], Path], finished_run: Path, name: str, place: str
) -> None:
    model, folder = opened(finished_run), finished_sparse(name)
    drafter = drafter_of(str(folder / place), model)
    assert written(model, drafter)[0] == written(model, None)[0]
    # Guessing for itself it is always right: the guesses are what the model itself would write.
    itself = opened(folder)
    tokens, accepted = written(itself, drafter_of(str(folder / place), itself))
    assert accepted >= len(tokens) // 2


def test_a_router_of_language_models_can_guess(finished_run: Path) -> None:
    model = opened(finished_run)
    model.mixture.router = small_router("lm", 2, vocab_size=model.tokenizer.vocab_size)
    drafter = drafter_of("router", model)
    assert isinstance(drafter, RouterDrafter)
    assert written(model, drafter)[0] == written(model, None)[0]


def test_a_router_that_is_no_language_model_is_refused(finished_run: Path) -> None:
    with pytest.raises(ConfigError, match="router is `unigram`, which is no language") as caught:
        drafter_of("router", opened(finished_run))
    assert 'mixture.router = "lm"' in str(caught.value.hint)


def test_a_model_of_another_tokenizer_is_refused_though_its_vocabulary_is_as_large(
    finished_run: Path, tmp_path: Path
) -> None:
    values = json.loads((finished_run / "mixture" / "tokenizer.json").read_text())
    vocab = values["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "swapped.json").write_text(json.dumps(values))
    other = TextTokenizer.load(tmp_path / "swapped.json")
    model = OpenModel(opened(finished_run).mixture, other)
    for place in ("mixture/experts/01-tales", "seed/best"):
        with pytest.raises(TokenizerError, match=r"`--draft`: .* another tokenizer") as caught:
            drafter_of(str(finished_run / place), model)
        assert "same data" in str(caught.value.hint)


def test_a_checkpoint_whose_tokenizer_nobody_knows_is_refused(
    finished_run: Path, tmp_path: Path
) -> None:
    far = shutil.copytree((finished_run / "seed" / "best").resolve(), tmp_path / "seed")
    with pytest.raises(TokenizerError, match="nothing says which tokenizer"):
        drafter_of(str(far), opened(finished_run))


def test_a_mixture_of_several_is_refused_and_one_of_its_experts_named(finished_run: Path) -> None:
    with pytest.raises(ConfigError, match=r"`--draft`: .* of 2 experts, not one model") as caught:
        drafter_of(str(finished_run), opened(finished_run))
    assert str(finished_run / "mixture" / "experts") in str(caught.value.hint)


def test_a_folder_that_is_no_model_is_refused(finished_run: Path, tmp_path: Path) -> None:
    model = opened(finished_run)
    with pytest.raises(CheckpointError, match="`--draft`: there is no "):
        drafter_of(str(tmp_path / "nothing"), model)
    with pytest.raises(CheckpointError, match="neither a run nor a mixture"):
        drafter_of(str(tmp_path), model)


def test_damaged_weights_are_found(finished_run: Path, tmp_path: Path) -> None:
    mixture = shutil.copytree(finished_run / "mixture", tmp_path / "mixture")
    weights = mixture / "experts" / "01-tales" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.unlink()
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        drafter_of(str(weights.parent), opened(finished_run))
