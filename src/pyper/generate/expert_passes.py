"""The experts of a mixture that are in memory, and whose turn it is."""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pyper.generate.expert_runner import ExpertRunner
from pyper.generate.pages import PagePool
from pyper.generate.reading import Job, Reading, Text
from pyper.mixture import Mixture
from pyper.nn import KVStore, Transformer

# Tokens of prompts in one pass, on a CPU and on a GPU.
_PREFILL_CHUNK, _PREFILL_CHUNK_ON_GPU = 512, 4096
# Passes of the experts in memory while one that is not there is waited for.
_PATIENCE = 256


class ExpertPasses:
    """Runs what experts have to read; those that are not in memory are loaded in turn."""

    def __init__(
        self, mixture: Mixture, pool: PagePool, *, compiled: bool, fixed_shapes: bool | None
    ) -> None:
        """compiled, fixed_shapes: see `MixtureReader`."""
        self.mixture, self.pool = mixture, pool
        self.compiled, self.fixed_shapes = compiled, fixed_shapes
        self._n_waited = 0
        # Experts of one shape, as a rule all, take their pages from one store.
        self._stores: dict[tuple[object, ...], KVStore] = {}
        self._runners: WeakKeyDictionary[Transformer, ExpertRunner] = WeakKeyDictionary()
        self._graph_pool: object = None

    def run(self, jobs: dict[int, list[Job]]) -> int:
        """Jobs by expert; those of experts that are not there yet are left undone.

        How many tokens of prompts were read.
        """
        if not jobs:
            return 0
        here, next_one = self._turn(list(jobs))
        new = [job.upto - job.reading.n_read for expert in here for job in jobs[expert]]
        for expert in here:
            self._run(expert, jobs[expert])
        if next_one is not None:
            self.mixture.load_ahead(next_one)
        return sum(n for n in new if n > 1)

    def prefill_chunk(self, expert: int) -> int:
        """Tokens of prompts that it should read in one pass."""
        if not self.mixture.is_loaded(expert):  # then the first ones wait for it anyway
            return _PREFILL_CHUNK
        is_gpu = self.mixture.expert(expert).device.type == "cuda"
        return _PREFILL_CHUNK_ON_GPU if is_gpu else _PREFILL_CHUNK

    def is_quick(self, expert: int) -> bool:
        """Whether it is in memory and reads single tokens in fixed shapes."""
        if not self.mixture.is_loaded(expert):
            return False
        return self._runner(self.mixture.expert(expert)).fixed_shapes

    def read_ahead(
        self, expert: int, texts: Sequence[tuple[Text, Reading]], tokens: Tensor
    ) -> Tensor:
        """log p (R, V) after one more token (R,) in each text; only of an expert that is quick.

        Its next pass overwrites them.
        """
        model = self.mixture.expert(expert)
        return self._runner(model).read_ahead(model, texts, tokens, self.pool)

    def _run(self, expert: int, jobs: list[Job]) -> None:
        # The model is known here only: it may have to make room for the next one.
        model = self.mixture.expert(expert)
        self._runner(model).read(model, jobs, self.pool)

    def _runner(self, model: Transformer) -> ExpertRunner:
        runner = self._runners.get(model)
        if runner is None:
            is_gpu = model.device.type == "cuda"
            if is_gpu and self._graph_pool is None:
                self._graph_pool = torch.cuda.graph_pool_handle()
            runner = self._runners[model] = ExpertRunner(
                model,
                self._store(model),
                self.mixture.settings.seq_len,
                fixed_shapes=is_gpu if self.fixed_shapes is None else self.fixed_shapes,
                compiled=self.compiled and is_gpu,
                graph_pool=self._graph_pool,
            )
        return runner

    def _turn(self, wanted: list[int]) -> tuple[list[int], int | None]:
        """The experts that run now, and one that is to be loaded meanwhile.

        Who is not in memory waits while others run, but not for ever.
        """
        here = [e for e in wanted if self.mixture.is_loaded(e)]
        away = [e for e in wanted if e not in here]
        room = self.mixture.resident - len(here)
        self._n_waited = self._n_waited + 1 if away else 0
        if not away or (room <= 0 and self._n_waited < _PATIENCE):
            return here, None
        self._n_waited = 0
        return (here, away[0]) if here else (away[:room], None)

    def _store(self, model: Transformer) -> KVStore:
        c = model.config
        shape = (c.kind, c.n_layers, c.attention_experts, c.kv_heads, c.dim_per_head, c.sparse)
        key = (*shape, model.dtype, model.device)
        if key not in self._stores:
            n_pages = self.pool.n_pages
            self._stores[key] = KVStore.allocate(c, n_pages, device=model.device, dtype=model.dtype)
        return self._stores[key]
