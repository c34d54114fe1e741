"""Weights in several safetensors files with an index, as `transformers` reads them."""

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pyper.errors import StorageError

INDEX = "model.safetensors.index.json"


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], *, shard_bytes: int) -> None:
    """Write tensors in order, a new file where one would exceed `shard_bytes`; one file needs no
    index. Only one file's tensors are held at a time. Raises StorageError."""
    parts: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size = total = 0
    for name, tensor in tensors:
        if held and size + tensor.nbytes > shard_bytes:
            parts.append(_write(folder, len(parts), held))
            held, size = {}, 0
        # A copy: parts of one tensor share memory, which the library refuses to save.
        held[name] = tensor.detach().cpu().clone().contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    parts.append(_write(folder, len(parts), held))
    _name_parts(folder, parts, total)


def _write(folder: Path, number: int, tensors: dict[str, Tensor]) -> list[str]:
    path = _part(folder, number)
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise StorageError(
            f"cannot write the weights: {error}", hint="free some space, or write elsewhere"
        ) from None
    path.chmod(folder.stat().st_mode & 0o666)  # the library lets nobody else read it
    return list(tensors)


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number}.safetensors"


def _name_parts(folder: Path, parts: list[list[str]], total: int) -> None:
    """The files' final names say how many there are."""
    if len(parts) == 1:
        _part(folder, 0).rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        _part(folder, number).rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
