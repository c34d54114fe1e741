"""What this machine has, and what is missing."""

import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from pyper.checkpoint import format_bytes
from pyper.stages.context import available_cores

_EXTRAS = {
    "zstandard": ("data", ".zst files"),
    "pyarrow": ("data", ".parquet, .arrow and .feather files"),
    "datasets": ("data", "data sets of Hugging Face"),
    "fastapi": ("serve", "`pyper serve`"),
    "transformers": ("export", "checking what `pyper export` wrote"),
    "gguf": ("export", "`pyper export --to gguf`"),
    "lm_eval": ("eval", "`pyper evaluate --tasks`"),
    "tensorboard": ("track", "`track.tensorboard`"),
    "wandb": ("track", "`track.wandb`"),
}
_MIN_DISK, _MIN_MEMORY = 2e9, 2e9


@dataclass(frozen=True)
class Finding:
    """One line of the report; `ok` is None for what is optional and absent."""

    what: str
    ok: bool | None
    found: str
    way_out: str = ""


def examine() -> list[Finding]:
    """Everything `pyper doctor` shows."""
    return [_python(), _torch(), *_devices(), _memory(), _disk(), *_extras()]


def _python() -> Finding:
    ok = sys.version_info >= (3, 11)
    return Finding("Python", ok, platform.python_version(), "" if ok else "install 3.11 or newer")


def _torch() -> Finding:
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    ok = (2, 11) <= (major, minor) < (2, 14)
    return Finding("torch", ok, torch.__version__, "" if ok else "pip install 'torch>=2.11,<2.14'")


def _devices() -> list[Finding]:
    threads = f"{available_cores()} cores, {torch.get_num_threads()} threads"
    found = [Finding("CPU", True, threads)]
    if not torch.cuda.is_available():
        return [*found, Finding("GPU", None, "none", "small models train on the CPU")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        text = f"{properties.name}, {format_bytes(properties.total_memory)}"
        found.append(Finding(f"GPU cuda:{index}", True, text))
    return found


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    ok = total >= _MIN_MEMORY
    return Finding("memory", ok, format_bytes(total), "" if ok else "2 GB are needed")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    ok = free >= _MIN_DISK
    return Finding("disk here", ok, f"{format_bytes(free)} free", "" if ok else "free 2 GB")


def _extras() -> list[Finding]:
    findings = []
    for package, (extra, use) in _EXTRAS.items():
        there = importlib.util.find_spec(package) is not None
        way_out = "" if there else f"for {use}: pip install 'pyper[{extra}]'"
        found = "installed" if there else "not installed"
        findings.append(Finding(package, True if there else None, found, way_out))
    return findings


def findings_table(findings: list[Finding]) -> Table:
    """✓ there, ✗ wrong, – optional and absent."""
    table = Table(show_header=False, box=None)
    marks = {True: "[green]✓[/]", False: "[red]✗[/]", None: "[dim]–[/]"}
    for finding in findings:
        way_out = finding.way_out.replace("[", "\\[")
        table.add_row(marks[finding.ok], finding.what, finding.found, way_out)
    return table
