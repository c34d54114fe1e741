"""Nested training state as tensors plus JSON, bit for bit and without pickle.

`torch.optim.Optimizer.state_dict()` has integer keys, tuples, `None`, tensors and numbers in one
tree. The tensors go to a flat dictionary (for safetensors); everything else becomes a JSON skeleton
in which one-key objects stand for what JSON lacks:

    {"$tensor": name}   {"$tuple": […]}   {"$dict": [[key, value], …]}   {"$array": [dtype, …]}
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyper.errors import CheckpointError


def flatten_state(nested: Mapping[Any, Any]) -> tuple[dict[str, Tensor], Any]:
    """Split nested state into tensors by path (`state.0.exp_avg`) and a JSON skeleton.

    Holds dicts, lists, tuples, tensors, NumPy arrays and numbers, str, int of any size, float,
    bool and None. A tensor that occurs twice is stored once. Raises CheckpointError naming the path
    of anything else.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _flatten(nested, "", tensors, {})
    return tensors, skeleton


def unflatten_state(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """Undo `flatten_state`. Raises CheckpointError when a tensor is missing."""
    if isinstance(skeleton, list):
        return [unflatten_state(tensors, item) for item in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    if len(skeleton) == 1 and next(iter(skeleton)).startswith("$"):
        return _unwrap(tensors, *next(iter(skeleton.items())))
    return {key: unflatten_state(tensors, item) for key, item in skeleton.items()}


def _flatten(value: Any, path: str, tensors: dict[str, Tensor], names: dict[int, str]) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Tensor):
        while path in tensors and id(value) not in names:
            path += "+"  # {"a.b": …} and {"a": {"b": …}} have the same path
        name = names.setdefault(id(value), path)
        tensors[name] = value
        return {"$tensor": name}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return {"$array": [value.dtype.str, list(value.shape), value.ravel().tolist()]}
    if isinstance(value, Mapping):
        return _flatten_dict(value, path, tensors, names)
    if isinstance(value, list | tuple):
        items = [_flatten(v, _join(path, i), tensors, names) for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    raise CheckpointError(
        f"`{path}` holds a {type(value).__name__}, which cannot be saved",
        hint="save tensors, numbers, text, lists, tuples and dictionaries",
    )


def _flatten_dict(
    value: Mapping[Any, Any], path: str, tensors: dict[str, Tensor], names: dict[int, str]
) -> Any:
    items = {k: _flatten(v, _join(path, k), tensors, names) for k, v in value.items()}
    if all(isinstance(key, str) and not key.startswith("$") for key in items):
        return items
    keys = [_flatten(key, path, tensors, names) for key in items]
    return {"$dict": [[key, item] for key, item in zip(keys, items.values(), strict=True)]}


def _unwrap(tensors: Mapping[str, Tensor], kind: str, content: Any) -> Any:
    if kind == "$tensor":
        if content not in tensors:
            raise CheckpointError(f"the saved state lacks the tensor `{content}`")
        return tensors[content]
    if kind == "$tuple":
        return tuple(unflatten_state(tensors, item) for item in content)
    if kind == "$dict":
        return {
            unflatten_state(tensors, key): unflatten_state(tensors, item) for key, item in content
        }
    if kind == "$array":
        dtype, shape, values = content
        return np.array(values, dtype=np.dtype(dtype)).reshape(shape)
    raise CheckpointError(f"the saved state holds an unknown `{kind}`")


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def same_state(left: Any, right: Any) -> bool:
    """Whether two nested states are equal, tensors bit for bit."""
    first, second = flatten_state({"": left}), flatten_state({"": right})
    return (
        first[1] == second[1]
        and first[0].keys() == second[0].keys()
        and all(torch.equal(t, second[0][name]) for name, t in first[0].items())
    )
