"""Where the training loops of several experts meet: each step is taken for all of them at once."""

import threading
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

from pyper.data import Batch
from pyper.errors import PyperError
from pyper.nn import Transformer
from pyper.nn.stacked_transformer import stacking_kind
from pyper.train.loss import LossFunction, next_token_loss
from pyper.train.optimizer import ExpertOptimizer
from pyper.train.recorded_step import RecordedStep
from pyper.train.stacked_step import StackedStep
from pyper.train.step import NewStep, StepResult


@dataclass(frozen=True, eq=False)
class _Member:
    """An expert whose loop takes its steps here."""

    number: int
    model: Transformer
    optimizer: ExpertOptimizer
    kind: Hashable
    """Equal for those that can be stacked; None for one that cannot."""
    alone: RecordedStep
    """What takes its steps when nobody can take them with it."""


@dataclass(frozen=True, eq=False)
class _Request:
    """A step that a loop waits for."""

    member: _Member
    micro_batches: Sequence[Batch]
    rate_factor: float
    result: "Future[StepResult]" = field(default_factory=Future)

    def fits(self, other: "_Request") -> bool:
        """Whether both can be taken at once."""
        kind, other_kind = self.member.kind, other.member.kind
        return kind is not None and kind == other_kind and self._shapes() == other._shapes()

    def _shapes(self) -> list[tuple[object, ...]]:
        return [(b.tokens.shape, b.weights is None) for b in self.micro_batches]

    def answer(self, result: StepResult | BaseException) -> None:
        """Let the loop go on."""
        if isinstance(result, StepResult):
            self.result.set_result(result)
        else:
            self.result.set_exception(result)


class StackedSteps:
    """Loops run in threads of their own, but one at a time; `run` steps while all of them wait.

    So nothing else uses the device during a step, and a loop does not notice the others. A loop
    that leaves, for whatever reason, is not waited for any more.
    """

    def __init__(self, n_loops: int) -> None:
        """The first step waits for so many loops, or for their leaving."""
        self._present = n_loops
        self._requests: list[_Request] = []
        self._taken: list[_Request] = []
        self._changed = threading.Condition()
        self._turn = threading.Lock()
        self._closed = False
        self._groups: dict[tuple[_Member, ...], StackedStep] = {}

    @contextmanager
    def loop(self, number: int) -> Iterator[NewStep]:
        """What loop `number` gives to `train_expert`; it has left when the context ends."""

        def new_step(
            model: Transformer, optimizer: ExpertOptimizer, loss_fn: LossFunction
        ) -> "_Steps":
            kind = stacking_kind(model) if loss_fn is next_token_loss else None
            alone = RecordedStep(model, optimizer, loss_fn)
            return _Steps(self, _Member(number, model, optimizer, kind, alone))

        with self._turn:
            try:
                yield new_step
            finally:
                with self._changed:
                    self._present -= 1
                    self._changed.notify_all()

    def run(self) -> None:
        """Take steps until all loops have left."""
        while self._present:
            with self._changed:
                self._changed.wait_for(lambda: len(self._requests) == self._present)
                self._taken, self._requests = self._requests, []
            self._step(self._taken)

    def close(self) -> None:
        """No step is taken any more: whoever asks for one gets an error."""
        with self._changed:
            self._closed = True
            for request in (*self._taken, *self._requests):
                if not request.result.done():
                    request.answer(_ended())

    def step(self, request: _Request) -> StepResult:
        """In a loop's thread: its next step, when all have asked for theirs."""
        with self._changed:
            if self._closed:
                raise _ended()
            self._requests.append(request)
            self._changed.notify_all()
        self._turn.release()
        try:
            return request.result.result()
        finally:
            self._turn.acquire()

    def _step(self, requests: Sequence[_Request]) -> None:
        groups = list(_groups_of(sorted(requests, key=lambda r: r.member.number)))
        self._forget_all_but([tuple(r.member for r in group) for group in groups])
        results = [self._results_of(group) for group in groups]
        # Only now: a loop that goes on uses the device.
        for group, own in zip(groups, results, strict=True):
            for request, result in zip(group, own, strict=True):
                request.answer(result)

    def _results_of(self, group: Sequence[_Request]) -> Sequence[StepResult | Exception]:
        try:
            return self._take(group)
        except Exception as error:  # of all of them: out of memory, mostly
            return [error] * len(group)

    def _take(self, group: Sequence[_Request]) -> Sequence[StepResult | Exception]:
        first = group[0]
        if len(group) == 1:
            return [first.member.alone(first.micro_batches, first.rate_factor)]
        members = tuple(request.member for request in group)
        if members not in self._groups:
            models, optimizers = [m.model for m in members], [m.optimizer for m in members]
            self._groups[members] = StackedStep(models, optimizers)
        parts, factors = [r.micro_batches for r in group], [r.rate_factor for r in group]
        return self._groups[members](parts, factors)

    def _forget_all_but(self, groups: Sequence[tuple[_Member, ...]]) -> None:
        """Of groups that are no more, recordings hold memory, and gradients."""
        for members in set(self._groups) - set(groups):
            self._groups.pop(members).forget()


class _Steps:
    """The step function of one loop."""

    def __init__(self, steps: StackedSteps, member: _Member) -> None:
        self._steps, self._member = steps, member

    def __call__(self, micro_batches: Sequence[Batch], rate_factor: float) -> StepResult:
        """One step, see `train_step`."""
        return self._steps.step(_Request(self._member, micro_batches, rate_factor))


def _groups_of(requests: Sequence[_Request]) -> Iterator[list[_Request]]:
    """Those that can be taken together, in their order."""
    groups: list[list[_Request]] = []
    for request in requests:
        for group in groups:
            if group[0].fits(request):
                group.append(request)
                break
        else:
            groups.append([request])
    yield from groups


def _ended() -> PyperError:
    return PyperError(
        "training of all experts at once has ended", hint="run the same command again to go on"
    )
