"""Hopper GPUs: whether there is one here, and kernels compiled for one without it."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from importlib.metadata import version
from typing import Any

import pytest
import torch

from pyper.kernels import launch


def on_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


needs_hopper = pytest.mark.skipif(not on_hopper(), reason="there is no Hopper GPU")


def is_tried_triton() -> bool:
    """Whether the kernels were written for this version, and are used with it."""
    return launch.HAS_TRITON and version("triton").startswith("3.6.")


def run_for_hopper(script: str, *arguments: object) -> str:
    """Run `script` where kernels are compiled, not interpreted; what it prints.

    Triton decides between the two once, when it is imported. Raises CalledProcessError where the
    script fails.
    """
    command = [sys.executable, "-c", script, *map(str, arguments)]
    folders = os.pathsep.join(sys.path)
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": folders}
    return subprocess.run(
        command, check=True, env=environment, stdout=subprocess.PIPE, text=True
    ).stdout


def build(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    default: str = "*bf16",
    whole: Collection[str] = (),
    gluon: bool = False,
    **options: Any,
) -> Any:
    """What Triton makes of `kernel`; `asm` holds its PTX and its SASS.

    types: of the arguments that are neither `constants` nor of the type `default`; pointers, and
    the numbers of `whole`, are multiples of 16. gluon: whether the kernel is one of Gluon.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, default) for n in names}
    at = [i for i, n in enumerate(names) if signature[n].startswith("*") or n in whole]
    assert not set(whole) & set(constants)
    aligned = {(i,): [["tt.divisibility", 16]] for i in at}
    source = (GluonASTSource if gluon else ASTSource)(kernel, signature, dict(constants), aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def spilled_bytes(ptx: str) -> list[int]:
    """What a thread stores to memory, and loads from it, because registers are short."""
    from triton.backends.nvidia.compiler import get_ptxas

    tool = get_ptxas(90).path  # Triton's own choice: an older one cannot read its PTX
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [tool, "-v", "--gpu-name", "sm_90a", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", said)]
