"""The whole pipeline on the embedded corpus."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from pyper.config import PrepareConfig, load_run
from pyper.data import TokenData, harvest
from pyper.evaluate import domains_table, results_table
from pyper.generate import SamplingConfig, complete
from pyper.stages.context import available_cores, open_context
from pyper.stages.pipeline import run_pipeline
from pyper.stages.prepare import prepare_with_progress
from pyper.stages.write import OpenModel, open_model

_BYTES_PER_DOMAIN = 500_000
_VOCAB_SIZE = 512
_PROMPT_TOKENS, _NEW_TOKENS = 24, 60


@dataclass(frozen=True)
class Sample:
    """A beginning from the test split, and how the mixture goes on."""

    domain: str
    prompt: str
    text: str
    experts: tuple[str, ...]


@dataclass(frozen=True)
class QuickstartResult:
    """What the quickstart shows."""

    folder: Path
    corpus: str
    report: dict[str, Any]
    samples: list[Sample]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "folder": str(self.folder),
            "corpus": self.corpus,
            "seconds": round(self.seconds, 1),
            "evaluation": self.report,
            "samples": [s.__dict__ for s in self.samples],
        }


def run_quickstart(output: Path, overrides: Sequence[str], console: Console) -> QuickstartResult:
    """Harvest, prepare, train, mix, evaluate, write; everything below `output`."""
    start = time.monotonic()
    jobs = min(2, available_cores())
    paths = [f"run.folder='{output}'", f"data.path='{output / 'data'}'", f"run.jobs={jobs}"]
    run = load_run("quickstart", [*paths, *overrides])
    with console.status("harvesting text from the installed packages"):
        corpus = harvest(output / "corpus", _BYTES_PER_DOMAIN)
    kilobytes = sum(d.bytes for d in corpus.domains.values()) / 1000
    console.print(
        f"harvested {kilobytes:,.0f} kB: {', '.join(corpus.domains)} "
        f"(sha256 {corpus.fingerprint[:12]})",
        highlight=False,
    )
    config = PrepareConfig(vocab_size=_VOCAB_SIZE)
    prepare_with_progress([output / "corpus"], run.data.path, config, console)
    context = open_context(run, console)
    report = run_pipeline(context)
    model = open_model(output, expert=None, mixing=None, resident=None, device="cpu")
    with console.status("writing"):
        samples = write_samples(model, context.data)
    seconds = time.monotonic() - start
    return QuickstartResult(output, corpus.fingerprint, report, samples, seconds)


def write_samples(model: OpenModel, data: TokenData) -> list[Sample]:
    """Go on from the beginning of one test document per domain."""
    test = data.documents("test")
    prompts = []
    for index, _ in enumerate(test.domains):
        document = int((test.domain_index == index).argmax())
        prompts.append(model.tokenizer.decode(test.read(document, 1, 1 + _PROMPT_TOKENS)))
    sampling = SamplingConfig(max_new_tokens=_NEW_TOKENS, temperature=0.7, top_p=0.9)
    completions = complete(model.mixture, model.tokenizer, prompts, sampling)
    return [
        Sample(domain, prompt, c.text, tuple(sorted({model.names[p.expert] for p in c.pieces})))
        for domain, prompt, c in zip(test.domains, prompts, completions, strict=True)
    ]


def print_result(result: QuickstartResult, console: Console) -> None:
    """Samples, tables, and what to try next."""
    for sample in result.samples:
        text = Text(sample.prompt, style="bold") + Text(sample.text)
        by = ", ".join(sample.experts)
        console.print(Panel(text, title=sample.domain, subtitle=f"by {by}", title_align="left"))
    console.print(domains_table(result.report), results_table(result.report))
    folder = result.folder
    console.print(f"done in {result.seconds:.0f} s; everything is in {folder}. Next:")
    console.print(f'  pyper generate {folder} -p "The " --show-experts', highlight=False)
    console.print(f"  pyper inspect {folder}", highlight=False)
    console.print("  pyper prepare MY_TEXTS -o data/mine", highlight=False)
    console.print(
        "  pyper train small --set data.path=data/mine --set run.folder=runs/mine",
        highlight=False,
    )
