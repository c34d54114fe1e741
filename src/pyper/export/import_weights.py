"""Weights from one safetensors file or several; never from pickles, which can execute code."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pyper.config import ExpertConfig
from pyper.errors import CheckpointError
from pyper.export.hf_weights import Shape, Stack, weight_map
from pyper.export.import_files import read_object
from pyper.export.shards import INDEX

_SINGLE = "model.safetensors"
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
}
_AGAIN = "download the model again"


@dataclass(frozen=True)
class _Place:
    """Where a tensor is."""

    file: Any
    shape: Shape
    dtype: str


class ForeignWeights:
    """The tensors of a folder; they are read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError for missing, damaged or foreign files."""
        self.folder = folder
        self._places: dict[str, _Place] = {}
        files, listed = _files(folder)
        for path in files:
            self._open(path)
        if lost := [name for name in listed if name not in self._places]:
            raise CheckpointError(
                f"{folder / INDEX} lists `{lost[0]}`, which is not in {listed[lost[0]]}",
                hint=_AGAIN,
            )

    def _open(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt", device="cpu")
            for name in file.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118
                part = file.get_slice(name)  # type: ignore[no-untyped-call]
                self._places[name] = _Place(file, tuple(part.get_shape()), str(part.get_dtype()))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} is no usable safetensors file: {error}", hint=_AGAIN
            ) from None

    @property
    def n_layers(self) -> int:
        """How many layers the names speak of."""
        numbers = (
            name.split(".")[2:3] for name in self._places if name.startswith("model.layers.")
        )
        return max((int(n[0]) + 1 for n in numbers if n and n[0].isdecimal()), default=0)

    def dtype(self, wanted: torch.dtype | None, config: Mapping[str, Any]) -> torch.dtype:
        """Of all weights here: as wished, as config.json says, or that of the input table."""
        stated = config.get("dtype", config.get("torch_dtype"))
        by_name = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
        table = self._places.get("model.embed_tokens.weight")
        of_table = DTYPES.get(table.dtype, torch.float32) if table else torch.float32
        present = {DTYPES.get(place.dtype) for place in self._places.values()}
        if wanted is None and by_name.get(stated) in present:
            return by_name[stated]
        return wanted or of_table

    def check(self, config: ExpertConfig) -> None:
        """Compare names and shapes with what the configuration needs.

        Raises CheckpointError naming a tensor that is missing, too many, misshapen or quantized.
        """
        if self.n_layers != config.n_layers:
            raise CheckpointError(
                f"config.json says {config.n_layers:,} layers (`num_hidden_layers`), the weights "
                f"have {self.n_layers:,}",
                hint=_AGAIN,
            )
        stacks = weight_map(config)
        needed = {
            name: shape
            for stack in stacks
            for name, shape in zip(stack.foreign, stack.shapes, strict=True)
        }
        for name, shape in needed.items():
            self._check_one(name, shape)
        self._check_surplus(needed, config)

    def _check_one(self, name: str, shape: Shape) -> None:
        place = self._places.get(name)
        if place is None:
            more = ""
            if name == "lm_head.weight":
                more = "; a model that shares it with the input table says `tie_word_embeddings`"
            raise CheckpointError(f"the weights lack `{name}`", hint=_AGAIN + more)
        if place.shape != shape:
            raise CheckpointError(
                f"`{name}` is {_by(place.shape)}, config.json makes it {_by(shape)}", hint=_AGAIN
            )
        if place.dtype not in DTYPES:
            raise CheckpointError(
                f"`{name}` is of type {place.dtype}: quantized weights cannot be imported",
                hint="use the model's bf16, fp16 or fp32 version",
            )

    def _check_surplus(self, needed: Mapping[str, Shape], config: ExpertConfig) -> None:
        for name in sorted(self._places.keys() - needed.keys()):
            if name.endswith(".rotary_emb.inv_freq"):  # old versions saved what they can compute
                continue
            if name == "lm_head.weight" and config.tie_embeddings:
                self._check_tied()
                continue
            raise CheckpointError(
                f"the weights hold `{name}`, which config.json gives no use",
                hint="the model computes something that its config.json does not say",
            )

    def _check_tied(self) -> None:
        head, table = (self._read(n) for n in ("lm_head.weight", "model.embed_tokens.weight"))
        if not torch.equal(head, table):
            raise CheckpointError(
                "config.json ties the head to the input table (`tie_word_embeddings`), but "
                "`lm_head.weight` differs from it",
                hint="set `tie_word_embeddings` to false in config.json if the head is meant",
            )

    def read(
        self,
        config: ExpertConfig,
        dtype: torch.dtype,
        on_tensor: Callable[[int, int], None] | None = None,
    ) -> dict[str, Tensor]:
        """Our tensors, by our names. Raises CheckpointError for values that are not finite.

        on_tensor: told how many tensors of how many are read.
        """
        stacks = weight_map(config)
        tensors = {}
        for number, stack in enumerate(stacks, start=1):
            tensors[stack.own] = self._stacked(stack, dtype)
            if on_tensor is not None:
                on_tensor(number, len(stacks))
        return tensors

    def _stacked(self, stack: Stack, dtype: torch.dtype) -> Tensor:
        parts = [self._read(name).to(dtype) for name in stack.foreign]
        for name, part in zip(stack.foreign, parts, strict=True):
            if not bool(part.isfinite().all()):
                raise CheckpointError(
                    f"`{name}` holds values that are not finite"
                    + ("" if bool(self._read(name).isfinite().all()) else " (NaN or infinity)"),
                    hint="the model is damaged, or `--dtype` is too narrow for it",
                )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self._places[name].file.get_tensor(name)
        return tensor


def _files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of weights, and where the index says that each tensor is."""
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE], {}
    if not (folder / INDEX).is_file():
        raise _no_weights(folder)
    listed = read_object(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{folder / INDEX} has no `weight_map`", hint=_AGAIN)
    for file in listed.values():
        # A name and nothing else: an index must not lead out of its folder.
        if not isinstance(file, str) or Path(file).name != file or "\0" in file:
            raise CheckpointError(
                f"{folder / INDEX} names the file {file!r}, which is outside the folder",
                hint="do not trust this model",
            )
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder / file} is missing; the index names it", hint=_AGAIN)
    return [folder / file for file in dict.fromkeys(listed.values())], listed


def _no_weights(folder: Path) -> CheckpointError:
    patterns = ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf")
    found = [path.name for pattern in patterns for path in sorted(folder.glob(pattern))]
    if not found:
        return CheckpointError(f"{folder} has neither {_SINGLE} nor {INDEX}", hint=_AGAIN)
    return CheckpointError(
        f"{folder} has its weights in {found[0]}: files that can execute code, or of another "
        "format, are not read",
        hint="convert it: `AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)`",
    )


def _by(shape: Shape) -> str:
    return " × ".join(map(str, shape)) or "a single number"
