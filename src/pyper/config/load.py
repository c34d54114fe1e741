"""Read a run file: TOML, `--set` overrides, and messages that name the key and a way out."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from pyper.config.explain import explain, nearest
from pyper.config.presets import list_presets, preset_path
from pyper.config.run import RunConfig
from pyper.config.train import TrainConfig
from pyper.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


def load_run(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, a run folder, or the name of a shipped one (`small`, `8x1b5` …).

    The settings that a run folder keeps are those of that folder, wherever it was copied to. Raises
    ConfigError for a missing file, bad TOML, unknown keys and values out of range.
    """
    file = find_run_file(path)
    values = read_toml(file)
    _settle_in(file, values)
    for override in overrides:
        apply_override(values, override)
    run = parse_run(values)
    if run.run.folder is None:
        named = run.run.model_copy(update={"folder": Path("runs") / file.stem})
        run = run.model_copy(update={"run": named})
    return run


def _settle_in(file: Path, values: dict[str, Any]) -> None:
    """Or a command on a copy of a run would read, and write, the run it was copied from."""
    # A user's own run file may have the same name; beside a run's lies a run.json.
    if file.name == "run.toml" and (file.parent / "run.json").is_file():
        section = values.setdefault("run", {})
        if isinstance(section, dict):
            section["folder"] = str(file.parent)


def find_run_file(path: Path | str) -> Path:
    """The file itself, or the shipped preset of that name; the nearest name when neither exists."""
    file = Path(path)
    if file.is_file():
        return file
    if file.is_dir() and (file / "run.toml").is_file():
        return file / "run.toml"
    if file.stem in list_presets() and file.suffix in ("", ".toml") and len(file.parts) == 1:
        return preset_path(file.stem)
    folder = file.parent if file.parent.is_dir() else Path()
    found = (f for f in folder.glob("*.toml") if f.name != "pyproject.toml")
    names = [*map(str, found), *list_presets()]
    raise ConfigError(
        f"no run file `{path}`",
        hint=nearest(str(path), names) or f"shipped ones: {', '.join(list_presets())}",
    )


def read_toml(file: Path) -> dict[str, Any]:
    """Parse one TOML file; the error names line and column."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{file} is not valid TOML: {error}",
            hint='text needs quotes: `schedule = "wsd"`',
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8: {error.reason}", hint="save it as UTF-8") from None


def apply_override(values: dict[str, Any], override: str) -> None:
    """Apply one `section.key=value`; the value is read as TOML, or else as plain text."""
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys) or len(keys) < 2:
        raise ConfigError(
            f"`--set {override}` is not of the form section.key=value",
            hint="for example `--set train.learning_rate=3e-4`",
        )
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    section = values
    for key in keys[:-1]:
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            raise ConfigError(f"`--set {override}`: `{key}` is not a section")
    if keys[0] == "train" and keys[-1] in ("epochs", "tokens", "steps"):
        for other in ("epochs", "tokens", "steps"):  # a budget replaces the one in the file
            section.pop(other, None)
    section[keys[-1]] = value


def parse_run(values: dict[str, Any]) -> RunConfig:
    """Check a whole run file, given as nested dictionaries."""
    experts = values.get("expert", ())
    for expert in experts if isinstance(experts, list | tuple) else ():
        if isinstance(expert, dict):
            _check_expert(expert)
    return validate(RunConfig, values)


def _check_expert(expert: dict[str, Any]) -> None:
    """The training keys of one `[[expert]]`, on their own, so that a message names them."""
    if isinstance(expert.get("weights"), dict):
        raise ConfigError(
            "`expert.weights` says how the numbers of a model are kept",
            hint=f"to weigh domains for one expert: `data.weights = {_toml(expert['weights'])}`",
        )
    beside = ("name", "index", "data", "train")
    own = {key: value for key, value in expert.items() if key not in beside}
    own |= expert.get("train", {})
    budget = {} if own.keys() & {"epochs", "tokens", "steps"} else {"epochs": 1}
    try:
        validate(TrainConfig, own | budget)
    except ConfigError as error:
        message = error.message.replace("`", "`expert.", 1)
        raise ConfigError(message, hint=error.hint) from None


def _toml(weights: dict[str, Any]) -> str:
    return "{ " + ", ".join(f"{name} = {weight}" for name, weight in weights.items()) + " }"


def validate(model: type[Model], values: dict[str, Any]) -> Model:
    """Validate with pydantic and turn its first complaint into one line and a hint."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise explain(model, error, "in the run file") from None
