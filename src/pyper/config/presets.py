"""The run files shipped with the package (`configs/*.toml`)."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def _folder() -> Path:
    """Inside an installed package, or at the root of a checkout."""
    installed = _PACKAGE / "presets"
    return installed if installed.is_dir() else _PACKAGE.parents[1] / "configs"


def list_presets() -> list[str]:
    """Names of the shipped run files."""
    return sorted(file.stem for file in _folder().glob("*.toml"))


def preset_path(name: str) -> Path:
    """Where the shipped run file `name` is."""
    return _folder() / f"{name}.toml"
