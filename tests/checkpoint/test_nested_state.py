import copy
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pyper.checkpoint import (
    CheckpointStore,
    capture_rng,
    flatten_state,
    restore_rng,
    same_state,
    unflatten_state,
)
from pyper.errors import CheckpointError

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**130), 2**130)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.lists(st.integers(0, 255), max_size=4).map(lambda x: torch.tensor(x, dtype=torch.uint8))
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers(0, 9), inner, max_size=3)
        | st.dictionaries(st.sampled_from(["$tensor", "$dict", "a.b", "a"]), inner, max_size=2)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(tree=trees)
def test_any_nested_state_comes_back_through_json(tree: object) -> None:
    tensors, skeleton = flatten_state({"root": tree})
    back = unflatten_state(tensors, json.loads(json.dumps(skeleton)))["root"]
    assert same_state(tree, back)
    assert repr(tree) == repr(back)  # types too: 1, 1.0 and True, lists and tuples


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()


def build(make: Callable[..., torch.optim.Optimizer]) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
    groups = [
        {"params": model[0].parameters(), "weight_decay": 0.0},
        {"params": model[1].parameters()},
    ]
    return model, make(groups, lr=0.1)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_a_resumed_optimizer_takes_bitwise_the_same_steps(
    make: Callable[..., torch.optim.Optimizer], tmp_path: Path
) -> None:
    model, optimizer = build(make)
    train(model, optimizer, 3)
    tensors, skeleton = flatten_state({"optimizer": optimizer.state_dict(), "rng": capture_rng()})
    store = CheckpointStore(tmp_path)
    store.save(3, model.state_dict(), tensors, {"nested": skeleton})
    train(model, optimizer, 3)

    resumed, again = build(make)
    train(resumed, again, 1)  # a state that must be overwritten
    checkpoint = store.load_latest()
    assert checkpoint is not None
    nested = unflatten_state(checkpoint.optimizer, checkpoint.state["nested"])
    resumed.load_state_dict(checkpoint.model)
    again.load_state_dict(nested["optimizer"])
    restore_rng(nested["rng"])
    train(resumed, again, 3)
    assert same_state(dict(model.state_dict()), dict(resumed.state_dict()))
    assert same_state(optimizer.state_dict(), again.state_dict())


def draws() -> tuple[float, float, float, list[float]]:
    return random.gauss(0, 1), random.random(), np.random.randn(), torch.randn(3).tolist()


def test_all_generators_go_on_where_they_were() -> None:
    draws()  # leaves half of a pair of Gaussians behind in Python's and NumPy's generators
    tensors, skeleton = flatten_state(capture_rng())
    skeleton = json.loads(json.dumps(skeleton))
    tensors = copy.deepcopy(tensors)
    expected = draws()
    draws()
    restore_rng(unflatten_state(tensors, skeleton))
    assert draws() == expected


def test_a_numpy_generator_with_its_128_bit_state_comes_back() -> None:
    generator = np.random.default_rng(7)
    generator.random(3)
    tensors, skeleton = flatten_state({"g": generator.bit_generator.state})
    expected = generator.random(5).tolist()
    other = np.random.default_rng(0)
    other.bit_generator.state = unflatten_state(tensors, json.loads(json.dumps(skeleton)))["g"]
    assert other.random(5).tolist() == expected


def test_numpy_arrays_and_numbers() -> None:
    array = np.arange(6, dtype=np.uint32).reshape(2, 3)
    tensors, skeleton = flatten_state({"a": array, "n": np.int64(3), "x": np.float64(0.1)})
    back = unflatten_state(tensors, json.loads(json.dumps(skeleton)))
    assert back["a"].dtype == np.uint32
    assert (back["a"] == array).all()
    assert (back["n"], back["x"]) == (3, 0.1)


def test_one_tensor_at_two_places_is_stored_once() -> None:
    shared = torch.ones(3)
    tensors, skeleton = flatten_state({"a": shared, "b": [shared]})
    assert list(tensors) == ["a"]
    back = unflatten_state(tensors, skeleton)
    assert back["b"][0] is back["a"]


def test_equal_paths_do_not_hide_each_other() -> None:
    state = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}}
    tensors, skeleton = flatten_state(state)
    assert same_state(unflatten_state(tensors, skeleton), state)
    assert len(tensors) == 2


def test_what_cannot_be_saved_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"`a\.1` holds a function"):
        flatten_state({"a": [0, draws]})
    with pytest.raises(CheckpointError, match="lacks the tensor `x`"):
        unflatten_state({}, {"a": {"$tensor": "x"}})
    with pytest.raises(CheckpointError, match="unknown"):
        unflatten_state({}, {"$pickle": "x"})


def test_same_state_sees_one_bit() -> None:
    left: dict[str, Tensor] = {"a": torch.zeros(3)}
    right = {"a": torch.tensor([0.0, 0.0, 1e-45])}
    assert same_state(left, copy.deepcopy(left))
    assert not same_state(left, right)
    assert not same_state({"a": 1}, {"a": 2})
