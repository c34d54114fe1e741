"""One expert and its passes: prompts as they come, single tokens in shapes that never change."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyper.generate.decode_step import BATCHES, DecodeStep, has_fixed_shapes
from pyper.generate.pages import PagePool
from pyper.generate.reading import Job, finish, read, take_pages
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
        """fixed_shapes: single tokens are read by a `DecodeStep`, where the expert allows it."""
        # Not the model: who evicts it must not find it kept here.
        self.store, self.max_tokens = store, max_tokens
        self.fixed_shapes = fixed_shapes and has_fixed_shapes(model)
        self.compiled, self.graph_pool = compiled, graph_pool
        self._steps: dict[int, DecodeStep] = {}

    def read(self, model: Transformer, jobs: Sequence[Job], pool: PagePool) -> None:
        """Run the jobs; each reading then knows its next prediction."""
        single = [job for job in jobs if self.fixed_shapes and _is_single(job)]
        others = [job for job in jobs if not (self.fixed_shapes and _is_single(job))]
        for start in range(0, len(single), BATCHES[-1]):
            self._decode(model, single[start : start + BATCHES[-1]], pool)
        if others:
            read(model, self.store, pool, others)

    def _decode(self, model: Transformer, jobs: Sequence[Job], pool: PagePool) -> None:
        for job in jobs:
            take_pages(job, pool)
        rows = [(job.text.tokens[job.start], job.start, job.reading.pages) for job in jobs]
        # A copy: the step overwrites its output.
        log_probs: Tensor = self._step(model, len(jobs)).run(model, rows).clone()
        for job, row in zip(jobs, log_probs.unbind(), strict=True):
            job.reading.last = row
            finish(job, pool)

    def _step(self, model: Transformer, n_rows: int) -> DecodeStep:
        batch = next(b for b in BATCHES if b >= n_rows)
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


def _is_single(job: Job) -> bool:
    """Whether the job reads the last token of a text and nothing else."""
    return job.n_new == 1 and job.n_held == 0 and job.upto == len(job.text.tokens)
