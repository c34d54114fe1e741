"""What a run leaves in its folder: weights, times of files, what was said; and damage to it."""

from collections.abc import Callable
from pathlib import Path

import torch

from pyper.checkpoint import load_checkpoint
from pyper.stages.context import Context

Open = Callable[..., Context]
"""The fixture `open_new`."""


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The best ones of a part of a run."""
    return load_checkpoint(folder / "best").model


def assert_same_weights(ours: Path, theirs: Path) -> None:
    one, two = weights_of(ours), weights_of(theirs)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def flip_a_bit(file: Path) -> None:
    """Near the end of a file, which may be shared with others."""
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.unlink()  # a mixture may share the file
    file.write_bytes(content)


def times_of(folder: Path, *below: str) -> dict[str, int]:
    """When the files of these parts of a run were written last."""
    files = [f for part in below for f in sorted((folder / part).rglob("*")) if f.is_file()]
    return {str(f): f.stat().st_mtime_ns for f in files if f.name != ".lock"}


def said(context: Context) -> str:
    """What the console of `open_new` was told."""
    return context.console.file.getvalue()  # type: ignore[attr-defined, no-any-return]
