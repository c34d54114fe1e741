"""`discover_scores = "lm"`: tiny language models go on from the unigram domains."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from run_files import Open

from mixture.small_documents import documents_of
from nn.small_experts import small_expert
from pyper.config import PrepareConfig
from pyper.data import Documents, prepare
from pyper.errors import DataError, InterruptedRun
from pyper.nn import Transformer
from pyper.routing import Assignment, assign_with_prices
from pyper.stages import assign as stage
from pyper.stages import tiny_lm
from pyper.stages.assign import assign
from pyper.stages.tiny_lm import document_scores

pytestmark = pytest.mark.usefixtures("one_thread", "few_steps")

LM = ("mixture.assign=discover", "mixture.discover_scores=lm", "mixture.discover_rounds=2")
LETTERS = "abcdefgh"


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_lm, "_STEPS", 25)


def walk(rng: np.random.Generator, step: int, length: int) -> str:
    """Letters that mostly follow each other in one direction."""
    jumps = np.where(rng.random(length) < 0.3, rng.integers(8, size=length), step)
    return "".join(LETTERS[at % 8] for at in jumps.cumsum())


@pytest.fixture(scope="module")
def up_and_down(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains of the same letters: only their order tells them apart."""
    folder = tmp_path_factory.mktemp("order")
    rng = np.random.default_rng(0)
    for domain, step in (("down", -1), ("up", 1)):
        (folder / "texts" / domain).mkdir(parents=True)
        for split, lengths in (("train", range(20, 60)), ("valid", range(20, 32)), ("test", [40])):
            lines = [json.dumps({"text": walk(rng, step, n)}) + "\n" for n in lengths]
            (folder / "texts" / domain / f"{split}.jsonl").write_text("".join(lines))
    prepare([folder / "texts"], folder / "data", PrepareConfig(tokenizer="bytes"))
    return folder / "data"


def domain_of(documents: Documents) -> NDArray[np.int64]:
    return documents.domain_index.astype(np.int64)


def purity(expert: NDArray[np.int64], documents: Documents) -> float:
    """Share of the documents that lie with the majority of their expert."""
    table = np.bincount(expert * 2 + domain_of(documents), minlength=4).reshape(2, 2)
    return float(table.max(axis=1).sum() / table.sum())


def mostly_right(documents: Documents, share: float) -> NDArray[np.int64]:
    """A division that puts `share` of the documents where they belong."""
    wrong = np.random.default_rng(0).permutation(len(documents)) >= share * len(documents)
    return domain_of(documents) ^ wrong


def test_rounds_mend_a_bad_division_of_texts_that_differ_in_order_alone(
    open_new: Open, up_and_down: Path
) -> None:
    context = open_new("run", f"data.path={up_and_down}", *LM)
    train, valid = (context.data.documents(split) for split in ("train", "valid"))
    bad = mostly_right(train, 0.7)
    assert purity(bad, train) < 0.75

    divided, prices = stage._refine(context, bad)

    assert purity(divided["train"], train) >= 0.95
    assert purity(divided["valid"], valid) >= 0.95
    home = divided["train"][domain_of(train) == 0]
    assert np.bincount(divided["valid"][domain_of(valid) == 0], minlength=2).argmax() == round(
        home.mean()
    )
    loads = np.bincount(divided["train"], weights=train.lengths)
    assert abs(loads[0] / loads.sum() - 0.5) <= train.lengths.max() / loads.sum()
    assert prices.shape == (2,)


def test_discovery_with_tiny_models_from_data_to_folder(
    open_new: Open, up_and_down: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = open_new("run", f"data.path={up_and_down}", *LM)
    assigned = assign(context)

    train = context.data.documents("train")
    assert purity(assigned.expert["train"], train) >= 0.8
    unigram = assign(open_new("unigram", f"data.path={up_and_down}", LM[0]))
    assert purity(unigram.expert["train"], train) <= 0.6
    assert sorted(assigned.names) == ["down", "up"]
    assert assigned.prices is not None
    assert assigned.counts.sum() == train.n_tokens

    # The folder is lost; the tiny models are not trained again.
    shutil.rmtree(context.folder.assignment)
    monkeypatch.setattr("pyper.train.recorded_step.train_step", None)
    again = assign(context)
    for split, expert in assigned.expert.items():
        assert np.array_equal(again.expert[split], expert)
    assert torch.equal(again.prices, assigned.prices)  # type: ignore[arg-type]


def as_on_other_cores() -> Callable[..., Assignment]:
    """`assign_with_prices` that first puts one document, on the edge, on the other side."""
    flips = [1]

    def divide(*args: Any, **kwargs: Any) -> Assignment:
        found = assign_with_prices(*args, **kwargs)
        found.expert[0] ^= flips.pop() if flips else 0
        return found

    return divide


def test_discovery_that_was_stopped_goes_on_with_what_is_trained(
    open_new: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = assign(open_new("whole", *LM))
    train_expert, begun = tiny_lm.train_expert, []

    def stop_in_the_third(*args: Any) -> Any:
        begun.append(args)
        return train_expert(*args, should_stop=lambda step: len(begun) == 3 and step == 10)

    with monkeypatch.context() as patched:
        patched.setattr(tiny_lm, "train_expert", stop_in_the_third)
        with pytest.raises(InterruptedRun, match="domain 0, round 2: stopped at step 10 of 25"):
            assign(open_new("stopped", *LM))

    monkeypatch.setattr(stage, "assign_with_prices", as_on_other_cores())
    resumed = assign(open_new("stopped", *LM))

    for split, expert in whole.expert.items():
        assert np.array_equal(resumed.expert[split], expert)


def naive_score(model: Transformer, document: list[int], seq_len: int) -> float:
    """Mean log-probability of the predictions within reach, times the length."""
    seen = document[: seq_len + 1]
    log_probs = model(torch.tensor([seen]))[0].double().log_softmax(-1)
    scores = [float(log_probs[t, seen[t + 1]]) for t in range(len(seen) - 1)]
    return sum(scores) / max(1, len(scores)) * len(document)


@torch.no_grad()
def test_scores_match_the_obvious_loop() -> None:
    rng = np.random.default_rng(0)
    lengths = [0, 1, 7, 8, 9, 30, *rng.integers(0, 30, 300)]  # more than are read at a time
    texts = [rng.integers(1, 17, length) for length in lengths]
    documents = documents_of(texts, [0] * len(texts))
    models = [small_expert(seed) for seed in range(3)]

    scores = document_scores(models, documents, seq_len=8)

    assert scores.dtype == torch.float32
    for row, text in enumerate(texts):
        expected = [naive_score(model, [0, *text.tolist()], 8) for model in models]
        torch.testing.assert_close(scores[row].tolist(), expected, rtol=1e-4, atol=1e-4)


def test_a_split_without_documents_has_no_scores() -> None:
    scores = document_scores([small_expert(), small_expert(1)], documents_of([], []), seq_len=8)
    assert scores.shape == (0, 2)


def test_held_out_documents_follow_score_less_price(
    open_new: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With models that are not equally good prices decide."""
    models = [small_expert(seed, vocab_size=257) for seed in range(2)]
    supply = itertools.cycle(models)
    monkeypatch.setattr(stage, "train_tiny_lm", lambda *args, **kwargs: next(supply))
    context = open_new("run", *LM)

    divided, prices = stage._refine(
        context, np.arange(context.data.documents("train").n_documents) % 2
    )

    differences = 0
    for split in ("valid", "test"):
        documents = context.data.documents(split)
        scores = document_scores(models, documents, seq_len=16)
        for row, expert in enumerate(divided[split]):
            value = scores[row].double() - int(documents.lengths[row]) * prices
            assert expert == value.argmax()
            differences += int(expert != scores[row].argmax())
    assert differences > 0


def test_too_little_text_for_a_tiny_model_is_refused(open_new: Open) -> None:
    long = ("data.seq_len=65536", "train.global_batch_tokens=65536")
    with pytest.raises(DataError) as caught:
        assign(open_new("starving", *LM, *long))
    assert caught.value.hint
