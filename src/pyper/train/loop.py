"""The training loop of one expert."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pyper.checkpoint import CheckpointStore, folder_lock
from pyper.config import TrackConfig, TrainConfig
from pyper.data import Batch, Loader
from pyper.errors import InterruptedRun, NonFiniteError
from pyper.evaluate.losses import HeldOut, domain_losses, held_out_windows, mean_loss
from pyper.mixture.expert_folder import load_tensors_into
from pyper.nn import Transformer
from pyper.routing import routing_record
from pyper.train.early_stopping import EarlyStopping
from pyper.train.interrupt import StopRequest, catch_signals
from pyper.train.loss import BatchTransform, LossFunction, next_token_loss
from pyper.train.metrics import Sink, open_sinks
from pyper.train.micro_batch import choose_micro_batch_size
from pyper.train.optimizer import ExpertOptimizer
from pyper.train.progress import Progress, Silent
from pyper.train.recorded_step import RecordedStep
from pyper.train.schedule import Schedule
from pyper.train.state import TrainState, restore, save
from pyper.train.step import NewStep, StepResult, explain_out_of_memory
from pyper.train.throughput import Throughput
from pyper.train.training_data import TrainingData

# Thresholds are set anew, from as many tokens, before each validation.
_CALIBRATION_TOKENS = 65_536


@dataclass(frozen=True)
class TrainPlan:
    """How long one expert trains, at which rates, and from which optimizer states."""

    name: str
    total_steps: int
    schedule: Schedule
    learning_rate: float
    """Peak; already found where the run file says "auto"."""
    random_seed: int = 0
    optimizer_state: dict[str, object] | None = None
    """The seed's, to go on from; None starts fresh."""


@dataclass(frozen=True)
class TrainResult:
    """How training ended."""

    name: str
    steps: int
    loss: float
    """Validation of the weights that were kept, nats per token."""
    best_step: int
    stopped_early: bool
    seconds: float


def train_expert(
    model: Transformer,
    data: TrainingData,
    config: TrainConfig,
    plan: TrainPlan,
    folder: Path,
    *,
    loss_fn: LossFunction = next_token_loss,
    batch_transform: BatchTransform | None = None,
    track: TrackConfig | None = None,
    progress: Progress | None = None,
    should_stop: Callable[[int], bool] | None = None,
    new_step: NewStep = RecordedStep,
) -> TrainResult:
    """Train `model` in place until its plan ends, validation stalls, or a signal comes.

    Goes on from the newest sound checkpoint in `folder`. Afterwards the model holds the best
    weights (the last ones without early stopping). `loss_fn` and `batch_transform` adapt the loop
    to other tasks; `should_stop(step)` is asked after every step; `new_step` makes what takes
    the steps.

    Raises NonFiniteError (nothing was updated; the last good checkpoint is named), InterruptedRun
    (the state was saved), OutOfMemoryError, LockedError, DataError and StorageError.
    """
    with folder_lock(folder), catch_signals() as stop_request:
        trainer = _Trainer(
            model=model,
            data=data,
            config=config,
            plan=plan,
            folder=folder,
            loss_fn=loss_fn,
            batch_transform=batch_transform,
            track=track or TrackConfig(),
            progress=progress or Silent(),
            new_step=new_step,
        )
        return trainer.run(stop_request, should_stop or (lambda step: False))


class _Trainer:
    """One expert's loop. What must survive a restart is in `TrainState`."""

    def __init__(
        self,
        *,
        model: Transformer,
        data: TrainingData,
        config: TrainConfig,
        plan: TrainPlan,
        folder: Path,
        loss_fn: LossFunction,
        batch_transform: BatchTransform | None,
        track: TrackConfig,
        progress: Progress,
        new_step: NewStep,
    ) -> None:
        self.model, self.config, self.plan, self.folder = model, config, plan, folder
        self.loss_fn, self.batch_transform = loss_fn, batch_transform
        self.track, self.progress, self.seq_len = track, progress, data.seq_len
        self.store = CheckpointStore(folder, keep_last=config.keep_checkpoints)
        self.held_out: list[HeldOut] = held_out_windows(
            data.valid, data.seq_len, config.eval_tokens
        )
        self.calibration = data.windows(_CALIBRATION_TOKENS) if model.has_thresholds else None
        loader = Loader(
            data.train,
            seq_len=data.seq_len,
            batch_size=config.global_batch_tokens // data.seq_len,
            random_seed=plan.random_seed,
            workers=data.loader_workers,
            domain_weights=data.domain_weights,
        )
        optimizer = ExpertOptimizer(model, config, plan.learning_rate, plan.random_seed)
        if plan.optimizer_state is not None:
            optimizer.load_state_dict(plan.optimizer_state)
        stopping = EarlyStopping.from_config(config.early_stopping)
        self.state = TrainState(model, optimizer, loader, stopping)
        self.step_fn = new_step(model, optimizer, loss_fn)
        self.throughput = Throughput(model, data.seq_len, config.global_batch_tokens)

    def run(self, stop_request: StopRequest, should_stop: Callable[[int], bool]) -> TrainResult:
        """The loop, as numbered steps."""
        # 1. go on where an earlier process stopped
        restore(self.state, self.store, self.progress)
        self._mark_best_again()
        sinks = open_sinks(self.folder, self.plan.name, self.track, self.state.step)
        self.progress.start(self.plan.name, self.plan.total_steps, self.state.step)
        try:
            if not self.state.finished:
                self._train(sinks, stop_request, should_stop)
        finally:
            self.state.loader.close()
            self.progress.close()
            for sink in sinks:
                sink.close()
        # 7. keep the best weights
        return self._finish()

    def _mark_best_again(self) -> None:
        """A kill may have come between the last checkpoint and the link `best` to it."""
        state = self.state
        chosen = state.step if state.finished else None
        if self.config.early_stopping is not None:
            chosen = state.stopping.best_step
        if state.step > 0 and state.step == chosen:
            self.store.mark_best(state.step)

    def _train(
        self, sinks: list[Sink], stop_request: StopRequest, should_stop: Callable[[int], bool]
    ) -> None:
        state, total = self.state, self.plan.total_steps
        micro_batch_size = choose_micro_batch_size(
            self.model, self.config, self.seq_len, self.loss_fn
        )
        self._compile()
        self.throughput.start(state.seconds)
        while not state.finished:
            # 2. read a batch
            batch = state.loader.next_batch()
            if self.batch_transform is not None:
                batch = self.batch_transform(batch)
            # 3. learn from it
            result = self._learn(batch, micro_batch_size)
            state.step += 1
            state.seconds = self.throughput.seconds
            state.finished = state.step >= total
            # 4. say how it goes
            if state.step % self.config.log_every == 0 or state.finished:
                self._log(sinks, result)
            # 5. validate
            is_best = False
            if state.step % self.config.eval_every == 0 or state.finished:
                is_best = self._validate(sinks)
                state.finished = state.finished or state.stopping.should_stop
                self._save(is_best)
            # 6. stop when asked to, with everything saved
            if (stop_request() or should_stop(state.step)) and not state.finished:
                self._save(best=False)
                raise InterruptedRun(
                    f"{self.plan.name}: stopped at step {state.step} of {total}, state saved",
                    hint="run the same command again to go on",
                    exit_code=stop_request.exit_code,
                )

    def _learn(self, batch: Batch, micro_batch_size: int) -> StepResult:
        factor = self.plan.schedule.factor(self.state.step)
        self.model.begin_step(self.state.step / self.plan.total_steps)
        parts = batch.split(micro_batch_size)
        try:
            return self.step_fn(parts, factor)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"{self.plan.name}, step {self.state.step + 1}: {error.message}; "
                f"last good checkpoint: {self._last_good()}",
                hint=error.hint,
            ) from None
        except RuntimeError as error:
            explained = explain_out_of_memory(error, self.plan.name, micro_batch_size)
            if explained is None:
                raise
            raise explained from None

    def _last_good(self) -> str:
        steps = self.store.steps()
        return f"step {steps[-1]}" if steps else "none yet"

    def _log(self, sinks: list[Sink], result: StepResult) -> None:
        factor = self.plan.schedule.factor(self.state.step - 1)
        record = {
            "step": self.state.step,
            "loss": result.loss,
            "gradient_norm": result.gradient_norm,
            "learning_rate": self.plan.learning_rate * factor,
            "tokens": self.state.step * self.config.global_batch_tokens,
            "epoch": self.state.loader.position.epoch,
            **routing_record(result.routing),
            **self.throughput.measure(self.state.step),
        }
        for sink in sinks:
            sink.write(record)
        self.progress.update(record)

    def _validate(self, sinks: list[Sink]) -> bool:
        """Log validation by domain; True when it is the best so far."""
        if self.calibration is not None:
            self.model.calibrate_thresholds(self.calibration.to(self.model.device))
        if not self.held_out:
            return True
        self.model.eval()
        by_domain = domain_losses(self.model, self.held_out)
        self.model.train()
        loss = mean_loss(by_domain, self.held_out)
        by_key = {f"valid/{domain}": value for domain, value in by_domain.items()}
        record = {"step": self.state.step, "valid_loss": loss, **by_key}
        for sink in sinks:
            sink.write(record)
        self.progress.update(record)
        return self.state.stopping.update(self.state.step, loss)

    def _save(self, best: bool) -> None:
        """Checkpoint; without early stopping the last one is the one to use."""
        keep = best if self.config.early_stopping is not None else self.state.finished
        save(self.state, self.store, best=keep)

    def _compile(self) -> None:
        if self.config.compile:
            self.model.compile_blocks()

    def _finish(self) -> TrainResult:
        state, stopping = self.state, self.state.stopping
        best = self.store.load_best()
        assert best is not None  # the last save of a finished run marks one
        load_tensors_into(self.model, best.model)
        use_best = self.config.early_stopping is not None
        result = TrainResult(
            name=self.plan.name,
            steps=state.step,
            loss=stopping.best_loss if use_best else stopping.last_loss,
            best_step=best.step,
            stopped_early=state.step < self.plan.total_steps,
            seconds=state.seconds,
        )
        self.progress.finish(result.name, result.steps, result.loss)
        return result
