"""Training on chats and weighted mixtures: the loss of the answers, and resuming to the bit."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_training import SEQ_LEN, Train, new_config, new_model, new_plan, trace_of

from pyper.config import PrepareConfig
from pyper.data import Batch, Loader, TokenData, prepare
from pyper.errors import InterruptedRun
from pyper.evaluate import domain_losses, held_out_windows, mean_loss
from pyper.train import TrainingData, train_expert
from pyper.train.loss import next_token_loss


@pytest.fixture(scope="module")
def chat_data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    """Chats and plain text, in a mixture of two to a half."""
    folder = tmp_path_factory.mktemp("chats")
    (folder / "in").mkdir()
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"what is {i}?"},
                {"role": "assistant", "content": f"{i} is {i}"},
            ]
        }
        for i in range(30)
    ]
    (folder / "in" / "talk.jsonl").write_text("\n".join(map(json.dumps, chats)))
    plain = [{"text": f"{i} men went to mow a meadow"} for i in range(30)]
    (folder / "in" / "prose.jsonl").write_text("\n".join(map(json.dumps, plain)))
    config = PrepareConfig(tokenizer="bytes", valid_fraction=0.2, test_fraction=0.1)
    prepare([folder / "in"], folder / "out", config)
    data = TokenData.open(folder / "out")
    weights = {"talk": 2.0, "prose": 0.5}
    return TrainingData(data.documents("train"), data.documents("valid"), SEQ_LEN, 0, weights)


def test_the_loss_and_its_gradient_are_those_of_the_answers_alone(chat_data: TrainingData) -> None:
    loader = Loader(chat_data.train, seq_len=SEQ_LEN, batch_size=8, random_seed=0)
    batch = loader.next_batch()
    assert batch.weights is not None
    assert 0 < batch.weights.sum() < batch.weights.numel()
    model = new_model()
    loss = next_token_loss(model, batch)
    loss.objective().backward()
    got = model.embedding.weight.grad
    model.zero_grad()

    logits = model(batch.tokens)
    counted = batch.weights.bool()
    expected = F.cross_entropy(logits[counted], batch.targets[counted], reduction="sum")
    expected.backward()
    assert float(loss.weight) == int(counted.sum())
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(got, model.embedding.weight.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("workers", [0, 2])
def test_stopping_after_every_step_changes_no_bit(
    train: Train, chat_data: TrainingData, tmp_path: Path, workers: int
) -> None:
    """With weights of answers and of domains, over the edges of epochs of different lengths."""
    data = dataclasses.replace(chat_data, loader_workers=workers)
    config, plan = new_config(steps=6, global_batch_tokens=48 * SEQ_LEN), new_plan(6)
    _, whole = train(tmp_path / "whole", config, plan, data=data)
    for _ in range(5):
        with pytest.raises(InterruptedRun):
            train(tmp_path / "parts", config, plan, data=data, should_stop=lambda step: True)
    _, parts = train(tmp_path / "parts", config, plan, data=data)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert trace_of(tmp_path / "whole") == trace_of(tmp_path / "parts")
    assert {record.get("epoch") for record in trace_of(tmp_path / "whole")} >= {0, 1}


def test_training_reads_the_weighted_mixture(
    train: Train, chat_data: TrainingData, tmp_path: Path
) -> None:
    """What the loop sees is what a loader with these weights hands out."""
    seen: list[Batch] = []

    def watch(batch: Batch) -> Batch:
        seen.append(batch)
        return batch

    train(tmp_path / "run", data=chat_data, batch_transform=watch)
    for weights, equal in ((chat_data.domain_weights, True), ({}, False)):
        loader = Loader(
            chat_data.train,
            seq_len=SEQ_LEN,
            batch_size=4,
            random_seed=new_plan().random_seed,
            domain_weights=weights,
        )
        expected = [loader.next_batch() for _ in seen]
        same = [torch.equal(a.tokens, b.tokens) for a, b in zip(seen, expected, strict=True)]
        assert all(same) == equal


def test_validation_is_over_the_answers(chat_data: TrainingData, tmp_path: Path) -> None:
    model = new_model()
    result = train_expert(model, chat_data, new_config(eval_tokens=4096), new_plan(), tmp_path)
    held_out = held_out_windows(chat_data.valid, SEQ_LEN, 4096)
    assert any(h.weights is not None for h in held_out)
    expected = mean_loss(domain_losses(model.eval(), held_out), held_out)
    assert result.loss == pytest.approx(expected, abs=1e-6)
    without = [dataclasses.replace(h, weights=None) for h in held_out]
    assert result.loss != pytest.approx(mean_loss(domain_losses(model, without), without), abs=1e-3)
