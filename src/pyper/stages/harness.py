"""Tasks of lm-evaluation-harness on a saved model."""

import difflib
import importlib.metadata
import importlib.util
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress, TaskID
from rich.table import Table

from pyper.errors import ConfigError, DataError, MissingExtraError, PyperError
from pyper.stages.write import open_model

Result = dict[str, Any]
Loaded = dict[str, dict[str, Any]]

# Few-shot examples are drawn with the seed that lm-evaluation-harness takes by default.
_FEWSHOT_SEED = 1234
_LOCAL = (
    "a task of your own needs no network: a .yaml with `dataset_path: json` and "
    "`dataset_kwargs: {data_files: {test: FILE.jsonl}}`"
)


@dataclass(frozen=True)
class HarnessOptions:
    """What is measured, and how."""

    tasks: Sequence[str]
    """Names, or .yaml files."""
    limit: int | None = None
    """Documents of each task; None: all."""
    fewshot: int | None = None
    """Examples before each question; None: as the task says. A task that says 0 keeps it."""
    mixing: str | None = None
    expert: str | None = None
    batch_tokens: int = 8192
    """Tokens that are read at a time."""
    device: str = "auto"


def split_names(tasks: str) -> list[str]:
    """Of `--tasks a,b`. Raises ConfigError where there are none."""
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ConfigError("`--tasks` names no task", hint="e.g. `--tasks hellaswag,arc_easy`")
    return list(dict.fromkeys(names))


def evaluate_tasks(path: Path, options: HarnessOptions, console: Console) -> Result:
    """Run tasks on a run's mixture, a mixture, a merged model, or one expert of them.

    Raises MissingExtraError without the extra `eval`, ConfigError for an unknown task or expert,
    DataError where a task's data cannot be had, CheckpointError, and PromptError where a task does
    not fit the model's context.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtraError("lm-eval", extra="eval", needed_for="`pyper evaluate --tasks`")
    from pyper.evaluate.harness import MixtureLM

    _check(options)
    model = open_model(
        path,
        expert=options.expert,
        mixing=options.mixing,
        resident=None,
        device=options.device,
    )
    with _only_our_bars(console) as bars:
        loaded = _load_tasks(options, bars)
        lm = MixtureLM(
            model.mixture, model.tokenizer, batch_tokens=options.batch_tokens, on_done=bars.show
        )
        found = _evaluate(lm, loaded, options)
    return {
        "model": str(path),
        "mixing": model.mixture.settings.mixing if len(model.names) > 1 else None,
        "experts": list(model.names),
        "lm_eval": importlib.metadata.version("lm_eval"),
        "limit": options.limit,
        "requests": lm.n_requests,
        "truncated": lm.n_truncated,
        "results": _results(found),
        "missing": _missing(found),
    }


def _check(options: HarnessOptions) -> None:
    if not options.tasks:
        raise ConfigError("no task was named", hint="e.g. `hellaswag`, or a .yaml of your own")
    for name, least in {"limit": 1, "fewshot": 0, "batch_tokens": 1}.items():
        value = getattr(options, name)
        if value is not None and value < least:
            message = f"`{name}` must be at least {least}, not {value}"
            raise ConfigError(message, hint=f"leave out `{name}`, or give another number")


def _load_tasks(options: HarnessOptions, bars: "_Bars") -> Loaded:
    """The tasks with their data, set up as asked."""
    from lm_eval.tasks import TaskManager

    bars.show("loading tasks", 0, len(options.tasks))
    are_files = [name.endswith((".yaml", ".yml")) for name in options.tasks]
    # Thousands of tasks are known by name: reading what they are takes ten seconds.
    manager = TaskManager(include_defaults=not all(are_files))
    loaded: Loaded = {"tasks": {}, "groups": {}, "group_map": {}}
    for name, is_file in zip(options.tasks, are_files, strict=True):
        if not is_file and name not in manager.task_index:
            raise ConfigError(
                f"lm-evaluation-harness has no task `{name}`",
                hint=_closest(name, manager.all_tasks) + _LOCAL,
            )
        found = _load_task(manager, name, is_file)
        twice = loaded["tasks"].keys() & found["tasks"].keys()
        if is_file and twice:  # groups may share a task; two files have two
            raise ConfigError(
                f"{name} is called `{min(twice)}`, as another task is",
                hint="give each file its own `task: NAME`",
            )
        for part, values in found.items():
            loaded[part] |= values
        bars.show("loading tasks", len(loaded["tasks"]), len(options.tasks))
    for task in loaded["tasks"].values():
        _set_fewshot(task, options.fewshot)
    return loaded


def _closest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {', '.join(f'`{found}`' for found in close)}? " if close else ""


def _load_task(manager: Any, name: str, is_file: bool) -> Loaded:
    try:
        found: Loaded = manager.load(_read_task(Path(name)) if is_file else name)
    except PyperError:
        raise
    except Exception as error:  # the libraries raise what they like
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, OSError):  # also that there is no network
            raise DataError(
                f"the data of the task `{name}` cannot be had: {reason}",
                hint=f"named tasks are downloaded from the Hugging Face Hub; {_LOCAL}",
            ) from None
        raise ConfigError(f"the task `{name}` cannot be used: {reason}", hint=_LOCAL) from None
    return found


def _read_task(file: Path) -> dict[str, Any]:
    """A task's file; `data_files` that are not here are looked for beside it."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if not file.is_file():
        raise ConfigError(f"there is no task file {file}", hint=_LOCAL)
    task = load_yaml(file, resolve_func=True)
    if "task" not in task:
        raise ConfigError(f"{file} has no `task: NAME`, so it is no task", hint=_LOCAL)
    data = dict(task.get("dataset_kwargs") or {})
    if "data_files" in data:
        task["dataset_kwargs"] = data | {"data_files": _beside(file, data["data_files"])}
    return dict(task)


def _beside(file: Path, names: Any) -> Any:
    if isinstance(names, dict):
        return {split: _beside(file, own) for split, own in names.items()}
    if isinstance(names, list):
        return [_beside(file, own) for own in names]
    there = file.parent / str(names)
    return str(there) if there.is_file() and not Path(str(names)).is_file() else names


def _set_fewshot(task: Any, wanted: int | None) -> None:
    """As lm-evaluation-harness' own command does: a task that says 0 means it."""
    own = task.get_config("num_fewshot")
    if own is None or (own != 0 and wanted is not None):
        task.set_config(key="num_fewshot", value=wanted or 0)
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)


def _evaluate(lm: Any, loaded: Loaded, options: HarnessOptions) -> Result:
    from lm_eval.evaluator import evaluate

    try:
        found: Result = evaluate(lm, loaded, limit=options.limit, log_samples=False)
    except PyperError:
        raise
    except Exception as error:  # tasks bring code of their own
        raise ConfigError(
            f"lm-evaluation-harness cannot run {', '.join(options.tasks)}: "
            f"{type(error).__name__}: {error}",
            hint="run the tasks one by one to see which it is; where memory is short, lower "
            "`--batch-tokens`",
        ) from error
    return found


def _results(found: Result) -> list[Result]:
    """One entry for each metric of each task, and of each group of tasks."""
    rows = []
    for task, numbers in {**found["results"], **found.get("groups", {})}.items():
        for key, value in numbers.items():
            metric, comma, variant = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            stderr = numbers.get(f"{metric}_stderr,{variant}")
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": variant,
                    "value": float(value),
                    "stderr": float(stderr) if isinstance(stderr, int | float) else None,
                    "n": numbers.get("sample_len"),
                    "fewshot": found["n-shot"].get(task),
                    "version": found["versions"].get(task),
                }
            )
    return rows


def _missing(found: Result) -> list[str]:
    """Metrics that a task lists and the library, without a word, does not know or compute."""
    missing = []
    for task, config in found.get("configs", {}).items():
        there = {key.partition(",")[0] for key in found["results"].get(task, {})}
        for metric in config.get("metric_list") or []:
            if isinstance(name := metric.get("metric"), str) and name not in there:
                missing.append(f"{task}: {name}")
    return missing


def harness_table(result: Result) -> Table:
    """The results for people; below them what was cut."""
    who = f"{result['mixing']} mixing" if result["mixing"] else result["experts"][0]
    table = Table(title=escape(f"{result['model']}, {who}"), box=SIMPLE_HEAD)
    table.add_column("task", overflow="fold")
    for name in ("shots", "metric", "value", "± stderr", "n"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for row in result["results"]:
        suffix = "" if row["filter"] == "none" else f" ({row['filter']})"
        table.add_row(
            escape(row["task"]),
            _cell(row["fewshot"]),
            escape(row["metric"] + suffix),
            f"{row['value']:.4f}" if abs(row["value"]) < 1000 else f"{row['value']:.3e}",
            "–" if row["stderr"] is None else f"{row['stderr']:.4f}",
            _cell(row["n"]),
        )
    table.caption = f"lm-evaluation-harness {result['lm_eval']}"
    if result["truncated"]:
        table.caption += (
            f"; {result['truncated']:,} of {result['requests']:,} texts were longer than the "
            "context and lost their beginning"
        )
    if result["missing"]:
        table.caption += f"; there is no value of {escape(', '.join(result['missing']))}"
    return table


def _cell(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


class _Bars:
    """One bar for each kind of work."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def show(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._tasks[what], completed=done, total=total)


@contextmanager
def _only_our_bars(console: Console) -> Iterator[_Bars]:
    """The libraries' own bars and warnings say little: they go nowhere, ours where stderr is."""
    here = Console(file=console.file, force_terminal=console.is_terminal, quiet=console.quiet)
    columns = [*Progress.get_default_columns(), MofNCompleteColumn()]
    bars = Progress(
        *columns,
        console=here,
        transient=True,
        disable=not here.is_terminal,
        redirect_stdout=False,
        redirect_stderr=False,  # or what goes nowhere would be printed above the bars
    )
    with redirect_stderr(io.StringIO()), bars:
        yield _Bars(bars)
