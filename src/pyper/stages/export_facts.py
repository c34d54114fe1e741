"""What a run knows about its model, for the model card."""

import json
from pathlib import Path
from typing import Any

from pyper.config import RunConfig, parse_run, read_toml
from pyper.data.manifest import read_manifest
from pyper.errors import PyperError
from pyper.export.card import DomainFacts
from pyper.mixture import MixtureSettings
from pyper.mixture.store import read_settings
from pyper.stages.folder import read_json


def run_around(model: Path) -> Path | None:
    """The run folder whose mixture a model is; another model that was put into it is not its."""
    run = model.parent if model.name == "mixture" else model
    return run if (run / "run.toml").is_file() else None


def export_name(model: Path, expert: str | None) -> str:
    """What to call it: the run or the folder, and the expert."""
    folder = run_around(model.resolve()) or model.resolve()
    return folder.name if expert is None else f"{folder.name}-{expert}"


def domain_facts(run: Path | None) -> list[DomainFacts]:
    """Training documents and tokens by domain; nothing where the data are gone."""
    settings = _settings(run)
    if settings is None:
        return []
    try:
        domains = read_manifest(settings.data.path).domains
    except PyperError:
        return []
    splits = {name: splits["train"] for name, splits in domains.items() if "train" in splits}
    return [DomainFacts(name, entry.documents, entry.tokens) for name, entry in splits.items()]


def recipe_facts(
    run: Path | None, evaluation: dict[str, Any] | None, expert: str | None = None
) -> dict[str, Any]:
    """How it was trained, as far as it is written down; expert: of that one alone."""
    settings = _settings(run)
    if settings is None or run is None:
        return {}
    number = None if expert is None else read_settings(run / "mixture").experts.index(expert)
    train = settings.train if number is None else settings.expert_train(number, expert)
    steps = (evaluation or {}).get("steps", {})
    facts: dict[str, Any] = {} if train.start_from is None else {"started from": train.start_from}
    facts |= {
        "optimizer": train.optimizer,
        "learning rate": train.learning_rate,
        "schedule": train.schedule,
        "tokens per step": train.global_batch_tokens,
        "precision": train.precision,
        "context": settings.data.seq_len,
        "experts": settings.mixture.n_experts,
        "documents divided by": settings.mixture.assign,
    }
    if number is None:
        facts |= _own_settings(settings)
    return facts | _steps(steps, number)


def _own_settings(settings: RunConfig) -> dict[str, str]:
    """What single experts do differently."""
    return {
        f"of expert {own.index if own.name is None else own.name}": ", ".join(
            f"{key} = {value}" for key, value in own.train.items()
        )
        for own in settings.expert
        if own.train
    }


def _steps(steps: dict[str, int], number: int | None) -> dict[str, Any]:
    by_expert = {name: n for name, n in steps.items() if name.startswith("expert:")}
    facts: dict[str, Any] = {}
    if by_expert and "seed" in steps:
        facts["steps of the seed"] = steps["seed"]
    if number is not None and f"expert:{number}" in by_expert:
        facts["steps of this expert"] = by_expert[f"expert:{number}"]
    elif by_expert:
        facts["steps of each expert"] = ", ".join(map(str, by_expert.values()))
    return facts


def evaluation_of(run: Path | None) -> dict[str, Any] | None:
    """evaluation.json."""
    saved = None if run is None else read_json(run / "evaluation.json")
    return saved if isinstance(saved, dict) else None


def evaluation_of_expert(report: dict[str, Any] | None, name: str) -> dict[str, Any] | None:
    """The numbers of one expert alone, as evaluation.json has those of one model."""
    if report is None or name not in report["expert_names"]:
        return None
    number = report["expert_names"].index(name)
    by_domain = {
        domain: row | {"experts": [row["experts"][number]]}
        for domain, row in report["by_domain"].items()
    }
    return report | {"experts": [report["experts"][number]], "by_domain": by_domain}


def mixing_in_words(settings: MixtureSettings) -> str:
    """The rule of a mixture, in a line."""
    if settings.mixing == "top1":
        return (
            f"one expert from token {settings.prefix_tokens} on, chosen by the `{settings.router}` "
            "router; before that the posterior over all"
        )
    top_k = min(settings.top_k, settings.n_experts)
    return (
        f"at every token the {top_k} likeliest, w ∝ p^{settings.temperature:g} of the text so far"
    )


def _settings(run: Path | None) -> RunConfig | None:
    try:
        return None if run is None else parse_run(read_toml(run / "run.toml"))
    except (PyperError, OSError, json.JSONDecodeError):
        return None
