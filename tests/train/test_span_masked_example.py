"""`examples/span_masked_qa.py` runs, and only the answers count."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_training import trace_of

from pyper.data import Batch, TextTokenizer


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "span_masked_qa.py"
    spec = importlib.util.spec_from_file_location("span_masked_qa", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("window", "counted"),
    [
        ("1+2=3;4+4=8;0+", "...3;....8;.."),
        ("2;1+3=4;", ";....4;"),
        ("=12;1+1", "12;..."),
        (";3+3=6", "....6"),
        ("1+1", ".."),
    ],
)
def test_weights_are_one_where_the_target_is_part_of_an_answer(
    example: ModuleType, window: str, counted: str
) -> None:
    tokens = torch.tensor([TextTokenizer.bytes_only().encode(window)])
    weighted = example.weigh_answers(Batch(tokens[:, :-1], tokens[:, 1:]))

    targets = zip(window[1:], weighted.weights[0].tolist(), strict=True)
    assert "".join(letter if weight else "." for letter, weight in targets) == counted


@pytest.mark.usefixtures("one_thread")
def test_the_example_learns_to_answer(example: ModuleType, tmp_path: Path) -> None:
    result = example.main(tmp_path, steps=40)

    losses = [record["loss"] for record in trace_of(tmp_path) if "loss" in record]
    assert result.steps == 40
    assert losses[-1] < losses[0] - 0.5
