"""What a folder is, and whether it is sound."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from pyper.checkpoint import MANIFEST, format_bytes, load_checkpoint, verify_manifest
from pyper.config import ExpertConfig, parse_run, read_toml
from pyper.data import TokenData
from pyper.errors import DataError, PyperError
from pyper.mixture.expert_folder import read_expert_config
from pyper.mixture.store import expert_folders, read_settings
from pyper.nn import count_parameters, flops_per_token
from pyper.stages.prepare import data_summary

Facts = dict[str, Any]


def inspect_path(path: Path) -> Facts:
    """Kind, contents and damage of a run, mixture, data folder or checkpoint.

    Raises DataError for anything else.
    """
    if not path.exists():
        raise DataError(f"there is no folder `{path}`", hint="check the path")
    if (path / "run.toml").is_file():
        return _run(path)
    if (path / "state.json").is_file():
        return _checkpoint(path)
    if (path / "config.json").is_file() and (path / "tokenizer.json").is_file():
        return _mixture(path)
    if (path / "manifest.json").is_file():
        return _data(path)
    raise DataError(
        f"{path} is no run, mixture, data folder or checkpoint",
        hint="pass a folder such as `runs/quickstart` or `runs/quickstart/mixture`",
    )


def expert_facts(config: ExpertConfig) -> Facts:
    """Parameters, work and memory of one expert."""
    parameters = count_parameters(config)
    return {
        "parameters": parameters,
        "flops_per_token": flops_per_token(config, config.seq_len),
        "bytes_fp32": 4 * parameters,
    }


def _run(path: Path) -> Facts:
    run = parse_run(read_toml(path / "run.toml"))
    damaged = []
    for manifest in sorted(path.rglob(MANIFEST)):
        damaged += _damage(partial(verify_manifest, manifest.parent))
    return {
        "kind": "run",
        "path": str(path),
        "expert": expert_facts(run.model),
        "n_experts": run.mixture.n_experts,
        "trained": [str(p.parent.relative_to(path)) for p in sorted(path.rglob("result.json"))],
        "mixed": (path / "mixture").is_dir(),
        "evaluated": (path / "evaluation.json").is_file(),
        "damaged": damaged,
    }


def _checkpoint(path: Path) -> Facts:
    damaged = _damage(lambda: verify_manifest(path.resolve()))
    facts: Facts = {"kind": "checkpoint", "path": str(path), "damaged": damaged}
    if not damaged:
        checkpoint = load_checkpoint(path)
        config = ExpertConfig.model_validate(checkpoint.state["model_config"])
        facts |= {"step": checkpoint.step, "expert": expert_facts(config)}
    return facts


def _mixture(path: Path) -> Facts:
    settings = read_settings(path)
    config = read_expert_config(path / expert_folders(settings)[0] / "config.json")
    return {
        "kind": "mixture",
        "path": str(path),
        "settings": settings.model_dump(mode="json"),
        "expert": expert_facts(config),
        "parameters": settings.n_experts * count_parameters(config),
        "damaged": _damage(lambda: verify_manifest(path)),
    }


def _data(path: Path) -> Facts:
    damaged = _damage(lambda: TokenData.open(path, verify=True))
    if damaged:
        return {"kind": "data", "path": str(path), "damaged": damaged}
    return data_summary(TokenData.open(path).manifest, path) | {"damaged": []}


def _damage(verify: Callable[[], object]) -> list[str]:
    try:
        verify()
    except PyperError as error:
        return [error.message]
    return []


def facts_table(facts: Facts) -> Table:
    """Facts as lines; damage in red."""
    table = Table(show_header=False, box=None)
    for key, value in facts.items():
        if key == "damaged":
            sound = "[green]✓ every hash is right[/]"
            table.add_row("hashes", "[red]✗ " + "; ".join(value) + "[/]" if value else sound)
        elif key == "expert":
            table.add_row("expert", _expert_line(value))
        else:
            table.add_row(key.replace("_", " "), _line(value))
    return table


def _expert_line(expert: Facts) -> str:
    return (
        f"{expert['parameters']:,} parameters, {expert['flops_per_token']:,} FLOPs per token, "
        f"{format_bytes(expert['bytes_fp32'])} in fp32"
    )


def _line(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{k}: {v}" for k, v in value.items()).replace("[", "\\[")
    if isinstance(value, list):
        return ", ".join(str(v) for v in value)
    return str(value)
