"""Between two recorded steps little is sent and little is run."""

import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from generate.test_batch_engine import ask
from generate.test_writing_text import BYTES, scripted
from nn.small_experts import small_expert
from pyper.generate import BatchEngine, EngineLimits, SamplingConfig
from pyper.generate import step_inputs as module
from pyper.generate.decode_step import DecodeStep
from pyper.generate.running import chances
from pyper.generate.step_inputs import StepInputs
from pyper.nn import PAGE_TOKENS, KVStore, Transformer

CPU = torch.device("cpu")


def test_the_device_has_what_the_rows_say_whoever_comes_and_goes() -> None:
    rng, inputs = random.Random(0), StepInputs(4, 5, CPU)
    texts: list[tuple[int, list[int]]] = []
    for _ in range(200):
        texts = [(at + 1, pages) for at, pages in texts if rng.random() < 0.9 and at < 70]
        while len(texts) < rng.randrange(5):
            at = rng.randrange(40)
            texts.append((at, [rng.randrange(1, 99) for _ in range(1 + at // PAGE_TOKENS)]))
        if rng.random() < 0.1:
            rng.shuffle(texts)
        for at, pages in texts:
            pages.extend([rng.randrange(1, 99)] * (at // PAGE_TOKENS + 1 - len(pages)))
        tokens = torch.tensor([rng.randrange(1000) for _ in texts], dtype=torch.long)
        known = rng.random() < 0.5
        rows = [(int(t) if known else 0, *text) for t, text in zip(tokens, texts, strict=True)]
        inputs.fill(rows, None if known else tokens)
        assert torch.equal(inputs.tokens[: len(rows)], tokens)
        assert inputs.positions.tolist() == [at for at, _ in texts] + [0] * (4 - len(texts))
        for (_, pages), row in zip(texts, inputs.pages.tolist(), strict=False):
            assert row[: len(pages)] == pages
        assert not inputs.pages[len(rows) :, 0].any()
        inputs.advance()


def test_a_text_that_goes_on_sends_one_number_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []

    def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
        sent.append(x.shape[1])
        return x.to(device)

    monkeypatch.setattr(module, "to_device", to_device)
    inputs, pages = StepInputs(2, 64, CPU), list(range(1, 31))
    for at in range(30 * PAGE_TOKENS - 1, 33 * PAGE_TOKENS):
        if at % PAGE_TOKENS == 0:
            pages.append(at)
        inputs.fill([(0, at, pages)], torch.tensor([7]))
        inputs.advance()
    assert sent == [30 + 2, 1, 1, 1]  # at first also its position, and that there is a text


def test_as_many_chances_at_a_time_as_one_likes() -> None:
    generator, ours = torch.Generator().manual_seed(5), chances(5)
    for _ in range(200):
        assert next(ours) == float(torch.rand(1, generator=generator))


class _Operations(TorchDispatchMode):
    """Counts those that would be work of a GPU; views are not."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not func.is_view:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("temperature", "most"), [(0.0, 3), (0.8, 12)])
def test_a_token_is_few_operations_beside_the_recorded_ones(
    temperature: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture = scripted("abcdefghijklmnopqrstuvwxyz", seq_len=200)
    engine = BatchEngine(mixture, BYTES, EngineLimits(cache_tokens=8192), fixed_shapes=True)
    for text in ("a", "ab", "abc"):
        engine.submit(ask(text, SamplingConfig(150, temperature, seed=len(text))))
    while not engine._ahead:
        engine.step()
    said = torch.zeros(4, 257).log_softmax(dim=-1)

    def recorded(self: DecodeStep, model: Transformer) -> torch.Tensor:
        return said

    monkeypatch.setattr(DecodeStep, "_compute", recorded)
    for _ in range(20):
        with _Operations() as run:
            engine.step()
        assert sum(run.counts.values()) <= most, run.counts


def test_rows_without_a_text_write_to_the_page_that_belongs_to_nobody() -> None:
    model = small_expert()
    store = KVStore.allocate(model.config, 4, device=model.device, dtype=model.dtype)
    step = DecodeStep(model, store, 4, 48)
    with torch.no_grad():
        step.run(model, [(1, 0, [1]), (2, 0, [2]), (3, 0, [3])])
        before = store.keys.clone()
        for at in range(1, 20):
            step.run(model, [(1, at, [1, 4])])
    changed = (store.keys != before).any(dim=(0, 2, 3)).view(-1, PAGE_TOKENS)
    assert changed[[2, 3]].sum() == 0
    assert changed[1, 1:].all()
