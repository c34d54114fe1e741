"""The run folder: where everything is, and what may change between two commands on it."""

import json
import os
import platform
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyper import __version__
from pyper.checkpoint import Json, read_manifest, storage_errors, verify_manifest
from pyper.checkpoint import write_json_atomically as write_json
from pyper.config import RunConfig, parse_run, read_toml
from pyper.data.manifest import DataManifest
from pyper.errors import CheckpointError, ConfigError, DataError, StorageError
from pyper.stages.toml import to_toml

# What can be changed on an existing run: it steers mixing and judging, not training.
_FREE_SECTIONS = ("evaluate", "track")
_FREE_KEYS = {
    "run": {"folder", "device", "jobs"},
    "mixture": {
        "router",
        "mixing",
        "prefix_tokens",
        "window",
        "temperature",
        "top_k",
        "prune",
        "price_scale",
    },
}


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    root: Path

    @property
    def assignment(self) -> Path:
        """Which document belongs to which expert."""
        return self.root / "assignment"

    @property
    def seed(self) -> Path:
        """The model that experts and control branch from."""
        return self.root / "seed"

    @property
    def control(self) -> Path:
        """The dense control."""
        return self.root / "control"

    @property
    def mixture(self) -> Path:
        """Experts and router, ready to use anywhere."""
        return self.root / "mixture"

    @property
    def evaluation(self) -> Path:
        """The numbers."""
        return self.root / "evaluation.json"

    def expert(self, index: int) -> Path:
        """One expert's training."""
        return self.root / "experts" / f"{index:02d}"

    def random_shard(self, index: int) -> Path:
        """One expert of the second control."""
        return self.root / "random-shards" / f"{index:02d}"

    def discovery_model(self, round_number: int, index: int) -> Path:
        """One tiny language model of domain discovery."""
        return self.root / "discovery" / f"round-{round_number}" / f"{index:02d}"

    def discovery_division(self, round_number: int) -> Path:
        """The division of the documents with which a round of domain discovery begins."""
        return self.root / "discovery" / f"round-{round_number}" / "division"

    def router_model(self, index: int) -> Path:
        """One tiny language model of the router."""
        return self.root / "routers" / f"{index:02d}"


def folder_of(run: RunConfig) -> RunFolder:
    """Where a run is, or will be."""
    return RunFolder(run.run.folder or Path("runs/run"))


def open_run(run: RunConfig, data: DataManifest) -> RunFolder:
    """Create the folder of a run, or check that an existing one has the same settings and data.

    Raises ConfigError that names the first setting that differs, DataError when the data are not
    those that the run was begun with, StorageError.
    """
    folder = folder_of(run)
    _make_folder(folder.root)
    existing, begun = folder.root / "run.toml", has_begun(folder)
    if begun and existing.is_file():
        _refuse_other_settings(parse_run(read_toml(existing)), run, folder.root)
    _write_run_file(existing, to_toml(run.model_dump(mode="json", exclude_none=True)))
    if begun:
        _refuse_other_data(folder.root, data.fingerprint)
    made_of = {"data": data.fingerprint, "tokenizer": data.tokenizer_fingerprint}
    write_json(folder.root / "run.json", {**_circumstances(), **made_of})
    return folder


def has_begun(folder: RunFolder) -> bool:
    """Whether anything was made; a first command that failed binds nobody to its settings."""
    first = (folder.assignment, folder.root / "discovery", folder.seed, folder.control)
    return any(path.exists() for path in (*first, folder.root / "experts"))


def _refuse_other_data(root: Path, fingerprint: str) -> None:
    """Experts trained on other text would be mixed with a new assignment: nothing would fit."""
    before = (read_json(root / "run.json") or {}).get("data")
    if before not in (None, fingerprint):
        raise DataError(
            f"the data have changed since {root} was begun",
            hint="use another folder, `--set run.folder=runs/NAME`, or delete this one",
        )


def _make_folder(root: Path) -> None:
    try:
        with storage_errors(root):
            root.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise StorageError(
            f"cannot make the run folder {root}: a file is in the way",
            hint="choose another one with `--set run.folder=runs/NAME`",
        ) from None


def _write_run_file(file: Path, text: str) -> None:
    """Whole or not at all: several processes open one run, and any of them may be killed."""
    temporary = file.with_name(f".tmp-{file.name}-{uuid.uuid4().hex}")
    with storage_errors(file):
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)


def _refuse_other_settings(before: RunConfig, now: RunConfig, root: Path) -> None:
    old, new = before.model_dump(mode="json"), now.model_dump(mode="json")
    for section in new:
        if section in _FREE_SECTIONS or old[section] == new[section]:
            continue
        free = _FREE_KEYS.get(section, set())
        if section == "expert":
            if any((root / part).exists() for part in ("experts", "control")):
                raise _other_settings("expert", "…", "…", root)
            continue  # nobody has trained by it yet
        for key in new[section]:
            if key not in free and old[section][key] != new[section][key]:
                raise _other_settings(
                    f"{section}.{key}", old[section][key], new[section][key], root
                )


def _other_settings(key: str, old: Any, new: Any, root: Path) -> ConfigError:
    return ConfigError(
        f"{root} was begun with other settings: `{key}` was {old!r}, now it is {new!r}",
        hint="use another folder, `--set run.folder=runs/NAME`, or delete this one",
    )


def _circumstances() -> dict[str, Json]:
    return {
        "command": sys.argv,
        "pyper": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of the checkout that the package runs from, if it does."""
    package = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "-C", str(package), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def is_complete(folder: Path, metadata: dict[str, Json]) -> bool:
    """Whether an atomically written folder is there, sound, and made from the same inputs."""
    if not folder.is_dir():
        return False
    try:
        manifest = read_manifest(folder)
        if any(manifest.metadata.get(key) != value for key, value in metadata.items()):
            return False
        verify_manifest(folder)
    except CheckpointError:
        return False
    return True


def read_json(path: Path) -> Any:
    """A small JSON file; None when there is none or it is damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
