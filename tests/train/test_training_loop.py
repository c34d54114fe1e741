"""What the loop does to weights, metrics and checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import SEQ_LEN, Train, new_config, new_model, new_plan, trace_of, weights_of

from pyper.checkpoint import load_checkpoint
from pyper.config import EarlyStoppingConfig, TrackConfig
from pyper.data import Batch
from pyper.errors import DataError, MissingExtraError, NonFiniteError, OutOfMemoryError
from pyper.nn import Transformer
from pyper.train import LossSum, Schedule, TrainingData, next_token_loss
from pyper.train.early_stopping import EarlyStopping
from pyper.train.optimizer import ExpertOptimizer
from pyper.train.step import train_step


def random_batch(seed: int = 0, *, weights: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(257, (6, SEQ_LEN + 1), generator=generator)
    chosen = torch.rand(6, SEQ_LEN, generator=generator).round() if weights else None
    return Batch(tokens[:, :-1], tokens[:, 1:], chosen)


def nan_at(step: int) -> Callable[[Transformer, Batch], LossSum]:
    """The loss of the update number `step` (1-based) is NaN."""
    calls = 0

    def loss(model: Transformer, batch: Batch) -> LossSum:
        nonlocal calls
        calls += 1
        sums = next_token_loss(model, batch)
        return LossSum(sums.total * float("nan"), sums.weight) if calls == step else sums

    return loss


def test_loss_falls(train: Train, tmp_path: Path) -> None:
    train(tmp_path, new_config(learning_rate=1e-2), new_plan(30, learning_rate=1e-2))

    losses = [record["loss"] for record in trace_of(tmp_path) if "loss" in record]
    assert losses[-1] < losses[0] - 1.0


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_accumulated_gradients_equal_one_pass(
    optimizer: str, micro_batch_size: int, weights: bool
) -> None:
    """Also where the parts differ in size and in weight."""
    config = new_config(optimizer=optimizer, adam_eps=1e-3)  # else Adam magnifies rounding
    results = []
    for size in (6, micro_batch_size):
        model = new_model()
        optimizer_ = ExpertOptimizer(model, config, 3e-3)
        parts = random_batch(weights=weights).split(size)
        results.append((train_step(model, parts, optimizer_, 1.0, next_token_loss), model))

    (whole, model), (cut, cut_model) = results
    assert cut.loss == pytest.approx(whole.loss, rel=1e-5)
    assert cut.gradient_norm == pytest.approx(whole.gradient_norm, rel=1e-4)
    ours, theirs = weights_of(cut_model), weights_of(model)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)


def test_nan_loss_names_the_last_good_checkpoint_and_leaves_it_the_newest(
    train: Train, tmp_path: Path
) -> None:
    with pytest.raises(
        NonFiniteError, match=r"tiny, step 5: the loss is nan.*last good checkpoint: step 3"
    ) as caught:
        train(tmp_path, loss_fn=nan_at(5))

    assert "learning_rate" in caught.value.hint
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-0000003"]
    _, mended = train(tmp_path)  # and from there training goes on as if nothing had been
    _, whole = train(tmp_path.with_name("whole"))
    assert all(torch.equal(mended[name], whole[name]) for name in whole)


def test_a_full_device_names_the_setting_to_change(train: Train, tmp_path: Path) -> None:
    def full(model: Transformer, batch: Batch) -> LossSum:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(OutOfMemoryError, match="tiny: out of memory at") as caught:
        train(tmp_path, loss_fn=full)

    assert "micro_batch_size" in caught.value.hint


def test_a_batch_without_any_weight_is_refused(train: Train, tmp_path: Path) -> None:
    def weightless(batch: Batch) -> Batch:
        return Batch(batch.tokens, batch.targets, torch.zeros(batch.tokens.shape))

    with pytest.raises(DataError, match="weights of a whole batch are zero"):
        train(tmp_path, batch_transform=weightless)


def test_nan_before_the_first_checkpoint_says_that_there_is_none(
    train: Train, tmp_path: Path
) -> None:
    with pytest.raises(NonFiniteError, match="last good checkpoint: none yet"):
        train(tmp_path, loss_fn=nan_at(1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_loss_updates_nothing_and_leaves_no_gradient(bad: float) -> None:
    model = new_model()
    optimizer = ExpertOptimizer(model, new_config(), 3e-3)
    before = weights_of(model)

    def poisoned(model: Transformer, batch: Batch) -> LossSum:
        sums = next_token_loss(model, batch)
        return LossSum(sums.total * bad, sums.weight)

    with pytest.raises(NonFiniteError):
        train_step(model, [random_batch()], optimizer, 1.0, poisoned)

    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(model).items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_early_stopping_stops_and_keeps_the_best_weights(train: Train, tmp_path: Path) -> None:
    """A rate that soon does harm: training stops long before its end."""
    config = new_config(eval_every=2, early_stopping={"patience": 3}, keep_checkpoints=1)
    schedule = Schedule("constant", 200, 0, 1.0, 0.0)
    plan = new_plan(200, learning_rate=0.5, schedule=schedule)
    result, weights = train(tmp_path, config, plan)

    losses = {r["step"]: r["valid_loss"] for r in trace_of(tmp_path) if "valid_loss" in r}
    assert result.stopped_early
    assert result.steps == result.best_step + 3 * 2
    assert result.loss == min(losses.values()) == losses[result.best_step]
    best = load_checkpoint(tmp_path / "best")
    assert best.step == result.best_step
    assert all(torch.equal(best.model[name], weights[name]) for name in best.model)


def test_without_early_stopping_the_last_weights_are_kept(train: Train, tmp_path: Path) -> None:
    plan = new_plan(16, learning_rate=0.5, schedule=Schedule("constant", 16, 0, 1.0, 0.0))
    result, _ = train(tmp_path, new_config(eval_every=2), plan)

    assert (result.steps, result.best_step, result.stopped_early) == (16, 16, False)
    losses = [r["valid_loss"] for r in trace_of(tmp_path) if "valid_loss" in r]
    assert result.loss == losses[-1] > min(losses)


def test_early_stopping_goes_on_from_its_saved_state() -> None:
    stopping = EarlyStopping.from_config(EarlyStoppingConfig(patience=2, min_delta=0.1))
    improved = [stopping.update(step, loss) for step, loss in enumerate([3.0, 2.0, 1.95])]
    copy = EarlyStopping.from_config(EarlyStoppingConfig(patience=2, min_delta=0.1))

    copy.load_state_dict(json.loads(json.dumps(stopping.state_dict())))

    assert improved == [True, True, False]  # 0.05 is less than min_delta
    assert copy == stopping
    assert not copy.should_stop
    assert not copy.update(3, 2.5)
    assert copy.should_stop
    assert (copy.best_step, copy.best_loss, copy.last_loss) == (1, 2.0, 2.5)


def test_without_patience_nothing_ever_stops() -> None:
    stopping = EarlyStopping.from_config(None)
    for step in range(100):
        stopping.update(step, float(step))
    assert not stopping.should_stop
    assert stopping.best_step == 0


def test_a_custom_loss_is_what_is_trained_and_logged(train: Train, tmp_path: Path) -> None:
    def twice(model: Transformer, batch: Batch) -> LossSum:
        sums = next_token_loss(model, batch)
        return LossSum(2 * sums.total, sums.weight)

    train(tmp_path / "once", plan=new_plan(1))
    train(tmp_path / "twice", plan=new_plan(1), loss_fn=twice)

    once, double = trace_of(tmp_path / "once")[0], trace_of(tmp_path / "twice")[0]
    assert double["loss"] == pytest.approx(2 * once["loss"])
    assert double["gradient_norm"] == pytest.approx(2 * once["gradient_norm"], rel=1e-4)


def test_batch_transform_decides_what_counts(train: Train, tmp_path: Path) -> None:
    """Weights on the first token only: the others get no gradient."""
    seen: list[torch.Size] = []

    def first_only(batch: Batch) -> Batch:
        weights = torch.zeros(batch.targets.shape)
        weights[:, 0] = 1.0
        seen.append(batch.tokens.shape)
        return Batch(batch.tokens, torch.full_like(batch.targets, 65), weights)

    train(
        tmp_path,
        new_config(learning_rate=1e-2),
        new_plan(40, learning_rate=1e-2),
        batch_transform=first_only,
    )

    assert seen == [torch.Size([4, SEQ_LEN])] * 40
    losses = [r["loss"] for r in trace_of(tmp_path) if "loss" in r]
    assert losses[-1] < 0.5 < losses[0]


def test_metrics_say_step_tokens_epoch_rate_and_validation_by_domain(
    train: Train, tmp_path: Path
) -> None:
    train(tmp_path, new_config(log_every=2, eval_every=4))

    records = trace_of(tmp_path)
    logged = [r for r in records if "loss" in r]
    validated = [r for r in records if "valid_loss" in r]
    assert [r["step"] for r in logged] == [2, 4, 6, 8]
    assert [r["tokens"] for r in logged] == [2 * 64, 4 * 64, 6 * 64, 8 * 64]
    assert logged[0]["learning_rate"] == pytest.approx(3e-3)  # the second of two warm-up steps
    assert [r["step"] for r in validated] == [4, 8]
    assert {"valid/sums", "valid/tales"} <= validated[0].keys()


def test_only_the_newest_checkpoints_are_kept(train: Train, tmp_path: Path) -> None:
    train(tmp_path, new_config(eval_every=1, keep_checkpoints=2))

    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-0000007", "step-0000008"]
    assert (tmp_path / "best").resolve().name == "step-0000008"


def test_the_seed_of_a_plan_decides_the_order_of_the_data(train: Train, tmp_path: Path) -> None:
    _, one = train(tmp_path / "one", plan=new_plan(random_seed=1))
    _, two = train(tmp_path / "two", plan=new_plan(random_seed=2))
    _, again = train(tmp_path / "again", plan=new_plan(random_seed=1))

    assert not torch.equal(one["head.weight"], two["head.weight"])
    assert all(torch.equal(one[name], again[name]) for name in one)


def test_a_run_too_short_of_validation_text_still_ends(
    train: Train, training_data: TrainingData, tmp_path: Path
) -> None:
    none = TrainingData(training_data.train, training_data.valid.select([]), SEQ_LEN)
    result, _ = train(tmp_path, data=none)
    assert result.steps == 8


@pytest.mark.parametrize(
    ("track", "package", "module"),
    [
        (TrackConfig(tensorboard=True), "tensorboard", "torch.utils.tensorboard"),
        (TrackConfig(wandb="project"), "wandb", "wandb"),
    ],
)
def test_a_tracker_that_is_not_installed_names_its_extra(
    train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    track: TrackConfig,
    package: str,
    module: str,
) -> None:
    absent: Any = None
    monkeypatch.setitem(__import__("sys").modules, module, absent)
    with pytest.raises(MissingExtraError, match=package) as caught:
        train(tmp_path, track=track)
    assert "pyper[track]" in caught.value.hint
