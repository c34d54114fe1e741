"""The GGUF file of one dense expert, and a look at what was written."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyper.data import TextTokenizer
from pyper.errors import CheckpointError, ConfigError, MissingExtraError
from pyper.export.gguf_model import gguf_architecture, gguf_metadata, gguf_tensors
from pyper.export.gguf_tokenizer import gguf_tokenizer
from pyper.nn import Transformer

FileType = Literal["f32", "f16", "bf16"]
_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32}  # `general.file_type`


def write_gguf(
    model: Transformer,
    tokenizer: TextTokenizer,
    path: Path,
    *,
    name: str,
    file_type: FileType,
    license_name: str | None = None,
    chat_template: str | None = None,
    stop_ids: Sequence[int] = (),
) -> str | None:
    """Write weights and tokenizer for llama.cpp; what it does differently, if anything.

    Matrices are of `file_type`, vectors float32. stop_ids: what ends a text beside the document
    token; the file has room for the first. Raises ConfigError or TokenizerError for what
    llama.cpp has no twin of, MissingExtraError.
    """
    gguf = _library()
    architecture, config = gguf_architecture(model.config), model.config
    words = gguf_tokenizer(tokenizer, config.vocab_size)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[file_type])
    if license_name is not None:
        writer.add_license(license_name)
    for key, value in gguf_metadata(config).items():
        kind = {int: "UINT32", float: "FLOAT32", str: "STRING"}[type(value)]
        writer.add_key_value(f"{architecture}.{key}", value, gguf.GGUFValueType[kind])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    writer.add_token_merges(words.merges)
    # Every document begins with this token, which also ends the one before it.
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.bos_id)
    if turn_ends := [index for index in stop_ids if index != tokenizer.bos_id]:
        writer.add_eot_token_id(turn_ends[0])
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    for key, tensor in _as_stored(model, file_type):
        data = _bytes_of(tensor) if tensor.dtype == torch.bfloat16 else tensor.numpy()
        raw = gguf.GGMLQuantizationType.BF16 if tensor.dtype == torch.bfloat16 else None
        writer.add_tensor(key, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return words.note


def check_gguf(path: Path, model: Transformer, file_type: FileType) -> int:
    """Read the file again and compare every tensor with the model's; how many there are.

    Raises CheckpointError for the first that differs.
    """
    written = {tensor.name: tensor for tensor in _library().GGUFReader(path).tensors}
    expected = dict(_as_stored(model, file_type))
    names = expected.keys() ^ written.keys()
    for name in sorted(names) or expected:
        same = not names and np.array_equal(
            np.ascontiguousarray(written[name].data).view(np.uint8).ravel(),
            _bytes_of(expected[name]).ravel(),
        )
        if not same:
            raise CheckpointError(
                f"the written `{name}` is not the model's", hint="export again, to another disk"
            )
    return len(expected)


def _as_stored(model: Transformer, file_type: FileType) -> Iterator[tuple[str, Tensor]]:
    """Names and weights, matrices in `file_type`, vectors in float32, on the CPU."""
    for name, tensor in gguf_tensors(model):
        dtype = _DTYPES[file_type] if tensor.ndim > 1 else torch.float32
        stored = tensor.detach().cpu().to(dtype).contiguous()
        if not stored.isfinite().all():
            raise ConfigError(
                f"`{name}` does not fit `{file_type}`: it holds numbers that are too large, or NaN",
                hint="use `--dtype bf16` or `--dtype fp32`",
            )
        yield name, stored


def _bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    """The tensor's bytes, with its shape but for the last dimension, which counts bytes."""
    return tensor.contiguous().view(torch.uint8).numpy()


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("gguf", extra="export", needed_for="`--to gguf`") from None
    return gguf
