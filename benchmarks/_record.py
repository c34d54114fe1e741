"""What every benchmark writes with `--json FILE`: its numbers, and what they depend on."""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pyper.stages.context import available_cores


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """`--json FILE`, the same in all benchmarks."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here as well")


def write_record(file: Path | None, results: Mapping[str, Any]) -> None:
    """Write `results` with commit, command and hardware; nothing where no file was asked for."""
    if file is None:
        return
    record = {
        "benchmark": Path(sys.argv[0]).stem,
        "commit": commit(),
        "command": ["python", *sys.argv],
        "hardware": hardware(),
        "results": results,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def commit() -> str | None:
    """The commit of this checkout, `-dirty` where files differ from it; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:  # no git here
        return None
    return done.stdout.strip() or None


def hardware() -> dict[str, Any]:
    """Processor, its usable cores, memory, GPUs, and the versions of Python and torch."""
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _processor(),
        "cores": available_cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": [f"{d.name}, {d.total_memory / 1e9:.1f} GB" for d in devices],
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def _processor() -> str:
    """The model name: `platform.processor()` is empty on most Linux systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
