"""Few experts in memory: one of them takes the memory of one, and others go on while it loads."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from generate.test_batch_engine import ask, contents, engine_of, run
from generate.test_writing_text import small_bytes
from mixture.small_mixtures import loaders_of, small_experts, small_settings
from mixture.test_mixture_folder import saved_mixture
from pyper.generate import Request, SamplingConfig
from pyper.mixture import Mixture
from pyper.nn import Transformer

# 12 MB in each of four experts.
SHAPE = {"d_model": 256, "n_layers": 4, "d_ff": 1024, "n_heads": 8}
EXPERT_BYTES = 4 * 4 * (4 + 8) * 256 * 256
PROGRAM = """
import sys
from pathlib import Path
from pyper.generate import BatchEngine, EngineLimits, Request, SamplingConfig
from pyper.mixture import load_mixture

def memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))

mixture, tokenizer = load_mixture(Path(sys.argv[1]), resident=int(sys.argv[2]))
engine = BatchEngine(mixture, tokenizer, EngineLimits(cache_tokens=512))

def use(expert: int) -> int:
    prompt = (tokenizer.bos_id, *tokenizer.encode("a prompt of some length"))
    engine.submit(Request(prompt, SamplingConfig(2, 0.0), expert=expert))
    while not engine.idle:
        engine.step()
    return memory()

print(*(use(expert) for expert in (0, 1, 2, 3, 0)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's accounts")
def test_one_resident_expert_takes_the_memory_of_one(tmp_path: Path) -> None:
    saved_mixture(tmp_path, shape=SHAPE)

    def growth(resident: int) -> float:
        """In experts, from the first that was used to all of them."""
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "mixture"), str(resident)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        first, *others = map(int, printed.split())
        return (max(others) - first) / EXPERT_BYTES

    assert growth(1) < 0.4
    assert 2.5 < growth(4) < 3.5


def slow_mixture(gate: threading.Event, resident: int) -> Mixture:
    """Expert 3 is not there before the gate opens."""
    experts = small_experts(vocab_size=257)

    def load() -> Transformer:
        assert gate.wait(timeout=30)
        return experts[3]

    loaders = [*loaders_of(experts[:3]), load]
    return Mixture(small_settings(router="experts"), loaders, None, resident=resident)


def pinned(expert: int, n: int) -> Request:
    return ask("hello", SamplingConfig(n, 1.0, seed=expert), expert=expert)


def test_others_go_on_while_an_expert_is_loaded() -> None:
    gate = threading.Event()
    engine = engine_of(slow_mixture(gate, resident=2))
    quick = engine.submit(pinned(0, 30))
    engine.step()
    slow = engine.submit(pinned(3, 4))
    first = [event.request_id for _ in range(10) for event in engine.step()]
    assert first == [quick] * 10
    gate.set()
    deadline = time.monotonic() + 30
    while engine.stats().resident_experts < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    events = run(engine)
    assert len(events[slow]) == 4


@pytest.mark.parametrize("resident", [1, 2, 3])
def test_how_many_experts_are_resident_changes_no_bit(resident: int) -> None:
    requests = [ask("a"), *(pinned(e, 5) for e in range(4)), ask("hello")]

    def written(mixture: Mixture) -> list[object]:
        engine = engine_of(mixture)
        numbers = [engine.submit(request) for request in requests]
        events = run(engine)
        return [contents(events[number]) for number in numbers]

    assert written(small_bytes(resident=resident)) == written(small_bytes())


def test_who_waits_for_an_expert_is_served_before_the_others_are_done() -> None:
    """One place, and a text that would hold it for longer than anybody should wait."""
    experts = small_experts(vocab_size=257, seq_len=1000)
    settings = small_settings(router="experts", seq_len=1000)
    engine = engine_of(Mixture(settings, loaders_of(experts), None, resident=1))
    greedy = SamplingConfig(900, 0.0)
    long = [engine.submit(ask(c, greedy, expert=0)) for c in "abcd"]
    engine.step()
    other = engine.submit(pinned(1, 1))
    order = [event.request_id for _ in range(400) for event in engine.step()]
    assert order.index(other) < 300 * len(long)
    assert len(set(order[order.index(other) :])) > 1  # and the others go on


def test_an_expert_that_cannot_be_loaded_says_so() -> None:
    experts = small_experts(vocab_size=257)

    def broken() -> Transformer:
        raise ValueError("no such expert")

    loaders = [*loaders_of(experts[:3]), broken]
    engine = engine_of(Mixture(small_settings(router="experts"), loaders, None))
    engine.submit(pinned(0, 5))
    engine.submit(pinned(3, 5))
    with pytest.raises(ValueError, match="no such expert"):
        run(engine)
