"""Pyper from Python: what the commands do, as functions.

Nothing is printed. `progress=True` shows on stderr what the command would show. What goes wrong is
a `PyperError` with a `message` and a `hint`.
"""

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from pyper.api.model import Mixing, Model, StrPath, load
from pyper.config import ExpertConfig, PrepareConfig, RunConfig, TrainConfig, load_run, parse_run
from pyper.config.load import validate
from pyper.errors import ConfigError
from pyper.stages.context import open_context
from pyper.stages.evaluate import evaluate
from pyper.stages.harness import HarnessOptions
from pyper.stages.harness import evaluate_tasks as run_tasks
from pyper.stages.merge_command import MergeOptions, merge_command
from pyper.stages.pipeline import run_pipeline
from pyper.stages.prepare import prepare_with_progress
from pyper.stages.train_texts import train_on_texts


def prepare(
    sources: StrPath | Iterable[StrPath],
    output: StrPath,
    *,
    tokenizer: str = "bpe",
    vocab_size: int = 4096,
    valid_fraction: float = 0.05,
    test_fraction: float = 0.05,
    min_chars: int = 1,
    split_by: Literal["document", "blank-line"] = "document",
    columns: Mapping[str, str] | None = None,
    filters: Sequence[str] = (),
    chat_template: StrPath | None = None,
    strict_tokenizer: bool = False,
    progress: bool = False,
) -> Path:
    """Turn files and folders of text into token shards, as `pyper prepare` does; gives `output`.

    tokenizer: `bpe` trains one of `vocab_size` entries, `bytes` needs none, or the path of a
    `tokenizer.json`. The fractions are shares of the documents. min_chars: shorter documents are
    left out. split_by: `blank-line` cuts text files at empty lines. columns: what is where, of
    `text`, `messages` and `domain`. filters: expressions of which all must hold. chat_template: a
    file in Jinja. strict_tokenizer: refuse one that changes text. docs/data.md says more. Raises
    DataError, TokenizerError, StorageError, ConfigError.

    >>> pyper.prepare(["texts/law", "texts/novels"], "data/mine", vocab_size=8192)
    >>> pyper.prepare("table.csv", "data/table", columns={"text": "body"}, filters=["chars > 20"])
    """
    values = {
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "valid_fraction": valid_fraction,
        "test_fraction": test_fraction,
        "min_chars": min_chars,
        "split_by": split_by,
        "columns": dict(columns or {}),
        "filter": _list(filters),
        "chat_template": chat_template,
        "strict_tokenizer": strict_tokenizer,
    }
    files = [Path(source) for source in _list(sources)]
    config = validate(PrepareConfig, values)
    prepare_with_progress(files, Path(output), config, _console(progress))
    return Path(output)


def train_run(
    run: StrPath | RunConfig | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    progress: bool = False,
) -> Path:
    """Train everything that a run lacks, mix and evaluate it, as `pyper train` does; its folder.

    run: a run file, a run folder, the name of a shipped run, or what a run file says as nested
    dictionaries. overrides: as for `--set`, e.g. `"train.epochs=2"`. Raises InterruptedRun after
    Ctrl-C (the state is saved: call it again), ConfigError, DataError, NonFiniteError,
    OutOfMemoryError, LockedError, StorageError.

    >>> folder = pyper.train_run("small", overrides=["data.path=data/mine"])
    >>> model = pyper.load(folder)
    """
    context = open_context(_run_of(run, overrides), _console(progress))
    run_pipeline(context)
    return context.folder.root


def train_expert(
    texts: Iterable[str] | StrPath,
    model: ExpertConfig,
    train: TrainConfig,
    *,
    seq_len: int = 128,
    tokenizer: str = "bpe",
    vocab_size: int = 4096,
    folder: StrPath | None = None,
    device: str = "auto",
    random_seed: int = 0,
    progress: bool = False,
) -> Model:
    """Train one expert, and give it as a model.

    texts: documents, one string each; or the folder that `prepare` wrote. model: its shape; the
    vocabulary follows the tokenizer. train: how long, and how. seq_len: tokens per sequence, and
    the context, where `model` has none. folder: where it trains and stays, as a run of one expert
    (`pyper.load` and the commands take it; called again, it goes on where it was stopped); None: in
    a temporary place. Raises what `train_run` raises.

    >>> shape = pyper.ExpertConfig(d_model=64, n_layers=2, n_heads=2)
    >>> model = pyper.train_expert(strings, shape, pyper.TrainConfig(epochs=4))
    """
    with tempfile.TemporaryDirectory(prefix="pyper-") as temporary:
        root = Path(temporary) / "run" if folder is None else Path(folder)
        train_on_texts(
            Path(texts) if isinstance(texts, str | os.PathLike) else texts,
            model,
            train,
            root,
            PrepareConfig(tokenizer=tokenizer, vocab_size=vocab_size, test_fraction=0.0),
            seq_len=seq_len,
            device=device,
            random_seed=random_seed,
            console=_console(progress),
        )
        return load(root, device=device)


def evaluate_run(
    run: StrPath | RunConfig | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    progress: bool = False,
) -> dict[str, Any]:
    """What `pyper evaluate RUN --json` prints: held-out losses of every mode, in nats per token.

    `control`, `oracle`, `routed` by length of the prefix, `posterior`, `by_domain` …; an arm that
    was not run is None. Raises CheckpointError where experts are not trained, ConfigError,
    DataError.

    >>> pyper.evaluate_run("runs/quickstart")["posterior"]["top2"]
    """
    return evaluate(open_context(_run_of(run, overrides), _console(progress)))


def evaluate_tasks(
    model: StrPath,
    tasks: StrPath | Sequence[StrPath],
    *,
    limit: int | None = None,
    fewshot: int | None = None,
    mixing: Mixing | None = None,
    expert: str | int | None = None,
    batch_tokens: int = 8192,
    device: str = "auto",
    progress: bool = False,
) -> dict[str, Any]:
    """What `pyper evaluate MODEL --tasks … --json` prints: tasks of lm-evaluation-harness.

    tasks: names, or .yaml files of your own. limit: documents of each. `results` has a row for each
    metric of each task: `task`, `metric`, `value`, `stderr`, `n`. While it runs, what this process
    writes to stderr is dropped. Raises MissingExtraError without `pip install 'pyper[eval]'`,
    ConfigError, DataError where a task's data cannot be had, PromptError.

    >>> pyper.evaluate_tasks("runs/quickstart", ["arc_easy"], limit=100)["results"]
    """
    names = [os.fspath(task) for task in _list(tasks)]
    alone = None if expert is None else str(expert)
    options = HarnessOptions(names, limit, fewshot, mixing, alone, batch_tokens, device)
    return run_tasks(Path(model), options, _console(progress))


def merge_run(
    run: StrPath,
    output: StrPath,
    *,
    routing: Literal["token_choice", "expert_choice", "threshold", "capped"] = "token_choice",
    top_k: int = 2,
    router: Literal["ridge", "means", "random"] = "ridge",
    attention: Literal["average", "soft"] = "average",
    device: str = "auto",
    progress: bool = False,
) -> dict[str, Any]:
    """Write a run's experts as one sparse model, as `pyper merge` does.

    Gives the validation losses, in nats per token: `loss` of the merged model, `before` of what it
    was made of. It is to be tuned: `train_run(…, overrides=["train.start_from=OUTPUT"])`. Raises
    CheckpointError for experts without a common seed, ConfigError, StorageError.

    >>> pyper.merge_run("runs/mine", "models/merged")["loss"]
    """
    options = MergeOptions(
        routing=routing,
        top_k=top_k,
        router=router,
        attention=attention,
        average=False,
        upcycle=None,
        noise=0.0,
        add=None,
        device=device,
    )
    return merge_command(Path(run), Path(output), options, _console(progress))


def _run_of(run: StrPath | RunConfig | Mapping[str, Any], overrides: Sequence[str]) -> RunConfig:
    if isinstance(run, str | os.PathLike):
        return load_run(Path(run), _list(overrides))
    if overrides:
        raise ConfigError(
            "`overrides` are for run files", hint="change the dictionary, or the configuration"
        )
    return run if isinstance(run, RunConfig) else parse_run(dict(run))


def _list(values: StrPath | Iterable[StrPath]) -> list[Any]:
    """One alone as a list of one: the letters of a string would be taken for several."""
    return [values] if isinstance(values, str | os.PathLike) else list(values)


def _console(progress: bool) -> Console:
    return Console(stderr=True, quiet=not progress)
