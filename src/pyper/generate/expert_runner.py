"""One expert and its passes: prompts as they come, single tokens in shapes that never change."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyper.generate.decode_step import BATCHES, DecodeStep, has_fixed_shapes
from pyper.generate.pages import PagePool
from pyper.generate.prefill_step import PrefillStep, filled_length
from pyper.generate.reading import Job, Reading, Text, conclude, publish, read, take_pages
from pyper.nn import KVStore, Transformer


class ExpertRunner:
    """Reads what is new of many texts with one expert, always the same."""

    def __init__(
        self,
        model: Transformer,
        store: KVStore,
        max_tokens: int,
        *,
        fixed_shapes: bool,
        compiled: bool,
        graph_pool: Any = None,
    ) -> None:
        """fixed_shapes: single tokens and the beginnings of single texts are read by a `DecodeStep`
        and a `PrefillStep`, where the expert allows it."""
        # Not the model: who evicts it must not find it kept here.
        self.store, self.max_tokens = store, max_tokens
        self.fixed_shapes = fixed_shapes and has_fixed_shapes(model)
        self.compiled, self.graph_pool = compiled, graph_pool
        self._steps: dict[int, DecodeStep] = {}
        self._beginnings: dict[int, PrefillStep | None] = {}

    def read(self, model: Transformer, jobs: Sequence[Job], pool: PagePool) -> None:
        """Run the jobs; each reading then knows its next prediction."""
        if not self.fixed_shapes:
            read(model, self.store, pool, jobs)
            return
        single = [job for job in jobs if _is_single(job)]
        others = [job for job in jobs if not _is_single(job)]
        if single:
            self._decode(model, single, pool)
        if len(others) == 1 and _is_beginning(others[0]):
            self._begin(model, others[0], pool)
        elif others:
            read(model, self.store, pool, others)

    def read_ahead(
        self,
        model: Transformer,
        texts: Sequence[tuple[Text, Reading]],
        tokens: Tensor,
        pool: PagePool,
    ) -> Tensor:
        """log p (R, V) after one more token (R,) in each text, which the host does not know yet.

        The next pass overwrites them: they are for who draws at once, and no reading keeps them.
        """
        rows = []
        for text, reading in texts:
            position = len(text.tokens)
            take_pages(reading, position + 1, pool)
            rows.append((0, position, reading.pages))
        said = self._step(model, len(rows)).run(model, rows, tokens)
        for text, reading in texts:
            publish(text, reading, pool)  # what the host knows by now
            reading.n_read, reading.last = len(text.tokens) + 1, None
        return said

    def _decode(self, model: Transformer, jobs: Sequence[Job], pool: PagePool) -> None:
        for job in jobs:
            take_pages(job.reading, job.upto, pool)
        rows = [(job.text.tokens[job.start], job.start, job.reading.pages) for job in jobs]
        # A copy: the step overwrites its output.
        said = self._step(model, len(jobs)).run(model, rows).clone().unbind()
        for job, row in zip(jobs, said, strict=True):
            job.reading.n_read, job.reading.last = job.upto, row
            publish(job.text, job.reading, pool)

    def _begin(self, model: Transformer, job: Job, pool: PagePool) -> None:
        """A length that comes for the first time is not worth a recording."""
        length = filled_length(job.n_new)
        if length not in self._beginnings:
            self._beginnings[length] = None
            read(model, self.store, pool, [job])
            return
        step = self._beginnings[length]
        if step is None:
            with torch.no_grad():
                step = PrefillStep(model, self.store, length, pool=self.graph_pool)
            self._beginnings[length] = step
        take_pages(job.reading, job.upto, pool)
        states = step.run(model, job.text.tokens[: job.upto], job.reading.pages)
        conclude(model, states, [job], pool)

    def _step(self, model: Transformer, n_rows: int) -> DecodeStep:
        most = BATCHES[-1]
        batch = next((b for b in BATCHES if b >= n_rows), -(-n_rows // most) * most)
        if batch not in self._steps:
            with torch.no_grad():
                self._steps[batch] = DecodeStep(
                    model,
                    self.store,
                    batch,
                    self.max_tokens,
                    compiled=self.compiled,
                    pool=self.graph_pool,
                )
        return self._steps[batch]


def _is_beginning(job: Job) -> bool:
    """Whether the job reads the first tokens of a text, and nothing on trial."""
    return job.start == 0 and not job.n_held and not job.guesses


def _is_single(job: Job) -> bool:
    """Whether the job reads the last token of a text and nothing else."""
    return job.n_new == 1 and job.n_held == 0 and job.upto == len(job.text.tokens)
