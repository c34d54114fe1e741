"""Tensors to and from safetensors files.

The format (https://github.com/huggingface/safetensors#format): eight bytes with the length of the
header, the header as JSON, the raw tensors. Written here and not by the library so that bytes are
hashed on their way to the disk, one tensor at a time is copied from the device, and a full disk is
an ordinary OSError. Read by the library, which maps the file into memory.
"""

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pyper.checkpoint.manifest import FileEntry
from pyper.errors import CheckpointError

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileEntry:
    """Write a safetensors file; returns size and hash of what was meant to be written.

    Any device, any strides. Raises CheckpointError for two names of one tensor and for types that
    the format lacks, OSError from the disk.
    """
    _refuse_ties(tensors)
    # widest first: every tensor then starts at a multiple of its own element size
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for data in _blocks(tensors, names):
            digest.update(data)
            file.write(data)
            size += len(data)
    return FileEntry(size, digest.hexdigest())


def read_tensors(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Tensors of a safetensors file; on CPU they are copy-on-write views of the mapped file.

    Raises CheckpointError for a missing or malformed file.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is no usable safetensors file: {error}", hint="use another checkpoint"
        ) from None


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that the tensors take."""
    return sum(tensor.nbytes for tensor in tensors.values())


def _blocks(tensors: Mapping[str, Tensor], names: list[str]) -> Iterator[bytes | memoryview]:
    yield _header(tensors, names)
    for name in names:
        if tensors[name].numel() == 0:
            continue  # no bytes, and strides that `view` refuses
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        yield memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _header(tensors: Mapping[str, Tensor], names: list[str]) -> bytes:
    header, start = {}, 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(f"`{name}` has type {tensor.dtype}, which cannot be saved")
        end = start + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    return struct.pack("<Q", len(text)) + text


def _refuse_ties(tensors: Mapping[str, Tensor]) -> None:
    seen: dict[tuple[torch.device, int], str] = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        first = seen.setdefault((tensor.device, tensor.data_ptr()), name)
        if first != name:
            raise CheckpointError(
                f"`{first}` and `{name}` share memory; loaded again they would be two tensors",
                hint="save one of the names and tie them after loading",
            )
