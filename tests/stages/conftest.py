"""Opening runs, and copies of a finished one."""

import io
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from sparse_runs import open_quietly, sparse_run

from pyper.config import RunConfig, parse_run
from pyper.stages.context import Context, open_context
from pyper.stages.pipeline import run_pipeline


@pytest.fixture
def open_new(new_run: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., Context]:
    """Open `tmp_path/NAME` with some settings changed; its console writes to memory."""

    def build(name: str, *settings: str, expert: Sequence[dict[str, Any]] = ()) -> Context:
        run = new_run(tmp_path / name, *settings)
        if expert:
            values = run.model_dump(mode="json", exclude_none=True)
            run = parse_run(values | {"expert": list(expert)})
        console = Console(file=io.StringIO(), width=300)
        return open_context(run, console)

    return build


@pytest.fixture
def copied_run(finished_run: Path, tmp_path: Path) -> str:
    """The name below `tmp_path` of a copy of the finished run."""
    shutil.copytree(finished_run, tmp_path / "copy", symlinks=True)
    return "copy"


@pytest.fixture(scope="session")
def finished_sparse(
    data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A whole run of each kind of routed model, made when it is first asked for."""
    folders: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in folders:
            folder = tmp_path_factory.mktemp("sparse") / name
            run_pipeline(open_quietly(sparse_run(name, folder, data_folder)))
            folders[name] = folder
        return folders[name]

    return folder_of
