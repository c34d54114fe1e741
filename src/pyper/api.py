"""Pyper from Python: what the commands do, as functions, and a saved model as an object.

Nothing is printed. `progress=True` shows on stderr what the command would show. What goes wrong is
a `PyperError` with a `message` and a `hint`.
"""

import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from pyper.config import ExpertConfig, PrepareConfig, RunConfig, TrainConfig, load_run, parse_run
from pyper.config.load import validate
from pyper.data import TextTokenizer
from pyper.errors import ConfigError, DataError, PromptError
from pyper.evaluate.harness_scores import final_weights, rolling_windows, score
from pyper.generate import Piece, SamplingConfig, complete, stream
from pyper.mixture import Mixture
from pyper.stages.context import open_context
from pyper.stages.evaluate import evaluate
from pyper.stages.harness import HarnessOptions
from pyper.stages.harness import evaluate_tasks as run_tasks
from pyper.stages.merge_command import MergeOptions, merge_command
from pyper.stages.pipeline import run_pipeline
from pyper.stages.prepare import prepare_with_progress
from pyper.stages.train_texts import train_on_texts
from pyper.stages.write import only_expert, open_model

StrPath = str | os.PathLike[str]
Mixing = Literal["posterior", "top1", "window"]


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text."""

    nats: float
    """−log p of the whole text."""
    tokens: int
    bytes: int

    @property
    def nats_per_token(self) -> float:
        """The loss."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return self.nats / self.bytes / math.log(2)

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return math.exp(self.nats_per_token)


class Model:
    """A mixture and its tokenizer.

    Several threads may use one model at a time, unless it was loaded with `resident`.
    """

    def __init__(self, mixture: Mixture, tokenizer: TextTokenizer) -> None:
        """For what `load` and `train_expert` give."""
        self.mixture, self.tokenizer = mixture, tokenizer

    def __repr__(self) -> str:
        rule = self.mixture.settings.mixing if len(self.experts) > 1 else "one expert"
        return f"<pyper.Model of {', '.join(self.experts)}; {rule}, context {self.context:,}>"

    @property
    def experts(self) -> tuple[str, ...]:
        """Their names; `Piece.expert` counts in this order."""
        return self.mixture.settings.experts

    @property
    def context(self) -> int:
        """The most tokens of a prompt and what is written after it, the document token included."""
        return self.mixture.settings.seq_len

    def expert(self, name: str) -> "Model":
        """One expert alone, by its name or number; the weights are shared.

        Raises ConfigError for one that is not there.
        """
        return Model(only_expert(self.mixture, name), self.tokenizer)

    def generate(
        self,
        prompt: str = "",
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float = 0.95,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> str:
        """What the model writes after `prompt`: text without the prompt.

        temperature: 0 takes the likeliest token each time. top_k, top_p: draw among the k likeliest
        tokens, or the fewest that reach p. stop: strings that end the text, not part of it. seed:
        the same one writes the same text. Raises PromptError for a prompt that does not fit the
        context, and for settings out of range.

        >>> model.generate("Once upon a time", max_new_tokens=40, stop=["."])
        """
        sampling = SamplingConfig(
            max_new_tokens, temperature, top_k, top_p, stop=_strings(stop), seed=seed
        )
        return complete(self.mixture, self.tokenizer, [prompt], sampling)[0].text

    def stream(
        self,
        prompt: str = "",
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float = 0.95,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> Iterator[Piece]:
        """As `generate`, piece by piece: `text`, the number of the `expert` that had the largest
        weight, and the `weights` of all.

        >>> for piece in model.stream("Once upon a time"):
        ...     print(piece.text, model.experts[piece.expert])
        """
        sampling = SamplingConfig(
            max_new_tokens, temperature, top_k, top_p, stop=_strings(stop), seed=seed
        )
        return stream(self.mixture, self.tokenizer, [prompt], sampling)

    def log_probs(self, text: str) -> Tensor:
        """log p (T,) in nats, float32 on the CPU, of each token given those before it.

        T tokens of `tokenizer.encode(text)`. A text longer than the context is read in windows, the
        last of which sees as much of what came before as there is room.

        >>> model.log_probs("to be or not to be").exp()
        """
        windows = rolling_windows(self._encode(text), self.tokenizer.bos_id, self.context)
        answers = score(self.mixture, windows, greedy=False)
        return torch.cat([torch.empty(0), *(answer.log_probs for answer in answers)])

    def score(self, text: str) -> Score:
        """How well the model predicts a text: nats, bits per byte, perplexity.

        Raises DataError for an empty text, PromptError for one that is no UTF-8.

        >>> model.score("to be or not to be").bits_per_byte
        """
        if not text:
            raise DataError("an empty text has no score", hint="leave it out")
        log_probs = self.log_probs(text)
        return Score(-float(log_probs.double().sum()), len(log_probs), len(text.encode()))

    def route(self, text: str) -> dict[str, float]:
        """The weight of each expert in what would be written after `text`; they add up to 1.

        Of a text longer than the context the beginning counts. After a few tokens several experts
        have some weight; `mixing="top1"` settles on one after the prefix that its settings say.

        >>> model.route("the party of the first part")
        {'law': 0.98, 'novels': 0.02}
        """
        tokens = [self.tokenizer.bos_id, *self._encode(text)][: self.context]
        return dict(zip(self.experts, final_weights(self.mixture, tokens), strict=True))

    def _encode(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise PromptError("the text is not UTF-8", hint="convert it to UTF-8") from None
        return self.tokenizer.encode(text)


def load(
    path: StrPath,
    *,
    device: str = "auto",
    mixing: Mixing | None = None,
    expert: str | None = None,
    resident: int | None = None,
) -> Model:
    """The mixture of a run folder, a mixture's folder, or a merged model.

    device: `auto` is the GPU where there is one. mixing: instead of the saved rule. expert: one
    alone, by name or number. resident: so many experts are in memory at a time; by default all are
    read and verified now. Raises CheckpointError, ConfigError, TokenizerError.

    >>> model = pyper.load("runs/quickstart", mixing="top1")
    """
    opened = open_model(Path(path), expert=expert, mixing=mixing, resident=resident, device=device)
    if resident is None:
        for index in range(opened.mixture.n_experts):
            opened.mixture.expert(index)
    return Model(opened.mixture, opened.tokenizer)


def prepare(
    sources: Iterable[StrPath],
    output: StrPath,
    *,
    tokenizer: str = "bpe",
    vocab_size: int = 4096,
    valid_fraction: float = 0.05,
    test_fraction: float = 0.05,
    progress: bool = False,
) -> Path:
    """Turn files and folders of text into token shards, as `pyper prepare` does; gives `output`.

    tokenizer: `bpe` trains one of `vocab_size` entries, `bytes` needs none, or the path of a
    `tokenizer.json`. The fractions are shares of the documents. Raises DataError, TokenizerError,
    StorageError, ConfigError.

    >>> pyper.prepare(["texts/law", "texts/novels"], "data/mine", vocab_size=8192)
    """
    values = {
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "valid_fraction": valid_fraction,
        "test_fraction": test_fraction,
    }
    if isinstance(sources, str):  # its letters would be taken for files
        sources = [sources]
    files = [Path(source) for source in sources]
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
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    fewshot: int | None = None,
    mixing: Mixing | None = None,
    expert: str | None = None,
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
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    options = HarnessOptions(names, limit, fewshot, mixing, expert, batch_tokens, device)
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
        return load_run(Path(run), overrides)
    if overrides:
        raise ConfigError(
            "`overrides` are for run files", hint="change the dictionary, or the configuration"
        )
    return run if isinstance(run, RunConfig) else parse_run(dict(run))


def _strings(stop: Sequence[str]) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _console(progress: bool) -> Console:
    return Console(stderr=True, quiet=not progress)
