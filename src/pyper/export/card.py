"""The model card: README.md of an exported folder, from what is known of the run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyper import __version__


@dataclass(frozen=True)
class DomainFacts:
    """What was trained on from one domain."""

    name: str
    documents: int
    tokens: int


@dataclass(frozen=True)
class CardFacts:
    """What a card says; empty where nothing is known."""

    name: str
    kind: str
    """In words: `a mixture of 8 language models` …"""
    architecture: str
    parameters: int
    seq_len: int
    vocab_size: int
    dtype: str
    mixing: str = ""
    """How experts are mixed, in words."""
    gguf_file: str | None = None
    needs_code: bool = False
    """Whether `trust_remote_code` is needed."""
    has_chat_template: bool = False
    license_name: str | None = None
    domains: Sequence[DomainFacts] = ()
    is_one_of_several: bool = False
    """An expert of a run, which saw only a part of the data after the seed."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] | None = None
    """evaluation.json."""
    notes: Sequence[str] = ()


def model_card(facts: CardFacts) -> str:
    """README.md."""
    sections = (
        _front_matter(facts),
        f"# {facts.name}",
        _summary(facts),
        _loading(facts),
        _data(facts),
        _recipe(facts),
        _evaluation(facts),
        _limits(facts),
        _licence(facts),
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(facts: CardFacts) -> str:
    """What the Hub reads: YAML, in which JSON's strings are valid."""
    lines = ["---"]
    if facts.license_name is not None:
        lines.append(f"license: {json.dumps(facts.license_name)}")
    lines += [
        f"library_name: {'gguf' if facts.gguf_file else 'transformers'}",
        "pipeline_tag: text-generation",
        "tags:",
        "- pyper",
        *(["- mixture-of-experts"] if facts.mixing else []),
        "---",
    ]
    return "\n".join(lines)


def _summary(facts: CardFacts) -> str:
    rows = {
        "architecture": f"`{facts.architecture}`",
        "parameters": f"{facts.parameters:,}",
        "context": f"{facts.seq_len:,} tokens",
        "vocabulary": f"{facts.vocab_size:,}",
        "weights": facts.dtype,
        "mixing": facts.mixing,
        "made with": f"Pyper {__version__}",
    }
    does = "knows a chat format" if facts.has_chat_template else "continues text: a base model"
    what = f"This is {facts.kind} that {does}."
    return f"{what}\n\n{_table(('', ''), [row for row in rows.items() if row[1]])}"


def _loading(facts: CardFacts) -> str:
    if facts.gguf_file:
        code = f'llama-cli -m {facts.gguf_file} --no-conversation -p "Once upon a time"'
        return f"## Use\n\n```sh\n{code}\n```"
    trust = ", trust_remote_code=True" if facts.needs_code else ""
    prompt = 'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
    if facts.has_chat_template:
        prompt = (
            'messages = [{"role": "user", "content": "Tell me a story."}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)\n'
        )
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'folder = "{facts.name}"  # where this file is\n'
        f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})\n"
        f"model = AutoModelForCausalLM.from_pretrained(folder{trust})\n"
        f"{prompt}"
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))"
    )
    text = f"## Use\n\n```python\n{code}\n```"
    if facts.needs_code:
        text += (
            "\n\nThe modelling files beside this one need torch and transformers, nothing else; "
            "`trust_remote_code` lets them run."
        )
    return text


def _data(facts: CardFacts) -> str:
    if not facts.domains:
        return ""
    rows = [(d.name, f"{d.documents:,}", f"{d.tokens:,}") for d in facts.domains]
    total = (sum(d.documents for d in facts.domains), sum(d.tokens for d in facts.domains))
    rows.append(("**all**", f"{total[0]:,}", f"{total[1]:,}"))
    table = "## Training data\n\n" + _table(("domain", "documents", "tokens"), rows)
    if not facts.is_one_of_several:
        return table
    return f"{table}\n\nThese are the data of all experts; this one went on with its part of them."


def _recipe(facts: CardFacts) -> str:
    if not facts.recipe:
        return ""
    rows = [(key, f"`{value}`") for key, value in facts.recipe.items()]
    return "## Training\n\n" + _table(("", ""), rows)


def _evaluation(facts: CardFacts) -> str:
    report = facts.evaluation
    if report is None:
        return "## Evaluation\n\nNone is on record: `pyper evaluate` measures a run."
    rows = [(name, _number(loss)) for name, loss in _arms(report) if loss is not None]
    text = (
        f"## Evaluation\n\nHeld-out loss over {report['tokens']:,} tokens of the split "
        f"`{report.get('split', 'test')}`, nats per token."
    )
    if report["control"] is not None:
        text += " The dense control had as many training tokens as seed and experts together."
    return f"{text}\n\n{_table(('', 'nats/token'), rows)}\n\n{_by_domain(report)}"


def _arms(report: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    if len(report["experts"]) == 1:
        return [("dense control", report["control"]), ("this model", report["experts"][0])]
    return [
        ("dense control", report["control"]),
        ("best expert of each window (oracle)", report["oracle"]),
        *((f"routed on {n} tokens", loss) for n, loss in report["routed"].items()),
        *((f"posterior, {k}", loss) for k, loss in report["posterior"].items()),
    ]


def _by_domain(report: Mapping[str, Any]) -> str:
    several = len(report["experts"]) > 1
    mode = "posterior, top2" if several else "this model"
    rows = [
        (
            domain,
            f"{row['tokens']:,}",
            _number(row["control"]),
            _number(row["posterior"]["top2"] if several else row["experts"][0]),
        )
        for domain, row in report["by_domain"].items()
    ]
    return _table(("domain", "tokens", "dense control", mode), rows)


def _limits(facts: CardFacts) -> str:
    lines = [
        f"It was trained on contexts of {facts.seq_len:,} tokens; longer ones are untested.",
        "It says what its training text would: it may be wrong, biased or offensive, and nothing "
        "here was done against that.",
        *facts.notes,
    ]
    if not facts.has_chat_template:
        lines.append("It follows no instructions and knows no chat format.")
    if not facts.domains:
        lines.append("What it was trained on is not recorded here.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _licence(facts: CardFacts) -> str:
    if facts.license_name is not None:
        return f"## Licence\n\n{facts.license_name}"
    return "## Licence\n\nNot stated. Whoever publishes this folder decides, and names it above."


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)


def _cell(text: str) -> str:
    """Names of domains are file names: a bar or a line end would break the table."""
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
