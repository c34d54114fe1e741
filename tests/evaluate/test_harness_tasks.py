"""`pyper evaluate MODEL --tasks` on tasks of our own: numbers as by hand, options, displays."""

import io
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from own_tasks import TASKS, measure
from rich.console import Console

from mixture.test_mixture_scoring import naive_log_probs
from pyper.cli import main
from pyper.mixture import load_mixture
from pyper.stages.harness import HarnessOptions, evaluate_tasks, harness_table
from serve import small_server

pytest.importorskip("lm_eval")

QUESTIONS = [json.loads(line) for line in (TASKS / "sums.jsonl").read_text().splitlines()]
TALES = [json.loads(line)["text"] for line in (TASKS / "tales.jsonl").read_text().splitlines()]
# The libraries' own.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.usefixtures("own_cache", "one_thread"),
]


def values_of(result: dict[str, Any]) -> dict[str, float]:
    return {row["metric"]: row["value"] for row in result["results"]}


def by_hand(model: Path, mixing: str, context: str, continuation: str) -> tuple[float, bool]:
    """One full pass for every token and every expert."""
    mixture, tokenizer = load_mixture(model)
    mixture.settings = mixture.settings.model_copy(update={"mixing": mixing})
    mixture.router = None  # the experts read the prefix: `naive_log_probs` knows how
    text = [tokenizer.bos_id, *tokenizer.encode(context + continuation)]
    said = naive_log_probs(mixture, text)[:-1]
    first = len(tokenizer.encode(context))
    scores = [float(p[token]) for p, token in zip(said, text[1:], strict=True)][first:]
    best = [int(p.argmax()) for p in said][first:]
    return sum(scores), best == text[1:][first:]


@pytest.fixture
def without_router(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyper.stages import harness

    def open_model(*arguments: Any, **options: Any) -> Any:
        opened = opened_before(*arguments, **options)
        opened.mixture.router = None
        return opened

    opened_before = harness.open_model
    monkeypatch.setattr(harness, "open_model", open_model)


@pytest.mark.usefixtures("without_router")
@pytest.mark.parametrize("mixing", ["posterior", "top1", "window"])
def test_choices_are_those_of_the_obvious_loop(model: Path, mixing: str) -> None:
    limit = 3
    right = right_by_length = 0
    for question in QUESTIONS[:limit]:
        scores = [
            by_hand(model, mixing, question["question"], f" {c}")[0] for c in question["choices"]
        ]
        lengths = [len(choice.encode()) for choice in question["choices"]]
        by_length = [score / n for score, n in zip(scores, lengths, strict=True)]
        right += scores.index(max(scores)) == question["answer"]
        right_by_length += by_length.index(max(by_length)) == question["answer"]

    result = measure(model, "sums", limit=limit, mixing=mixing)

    assert values_of(result) == {"acc": right / limit, "acc_norm": right_by_length / limit}
    assert {row["n"] for row in result["results"]} == {limit}
    assert result["mixing"] == mixing
    assert result["requests"] == 4 * limit


@pytest.mark.usefixtures("without_router")
def test_bits_per_byte_are_those_of_the_obvious_loop(model: Path) -> None:
    texts = TALES[:3]
    nats = -sum(by_hand(model, "posterior", "", text)[0] for text in texts)

    values = values_of(measure(model, "tales", limit=3))

    per_byte = nats / sum(len(text.encode()) for text in texts)
    assert values["bits_per_byte"] == pytest.approx(per_byte / math.log(2), abs=1e-5)
    assert values["byte_perplexity"] == pytest.approx(math.exp(per_byte), rel=1e-4)
    words = sum(len(text.split()) for text in texts)
    assert values["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-3)


def test_written_answers_are_compared_with_the_right_ones(model: Path, tmp_path: Path) -> None:
    """What one expert writes greedily is made the right answer of every second question."""
    mixture, tokenizer = load_mixture(model)
    lines = []
    for number, question in enumerate(QUESTIONS[:6]):
        tokens = [tokenizer.bos_id, *tokenizer.encode(question["question"])]
        n = len(tokens)
        for _ in range(8):
            tokens.append(int(mixture.expert(1)(torch.tensor([tokens]))[0, -1].argmax()))
        written = tokenizer.decode(tokens[n:]).split(" ")[0].split("0")[0]
        lines.append(question | {"total": f"{written}{'x' * (number % 2)}"})
    shutil.copy(TASKS / "writing.yaml", tmp_path)
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    task = str(tmp_path / "writing.yaml")
    result = evaluate_tasks(model, HarnessOptions([task], expert="maths"), Console(quiet=True))

    assert values_of(result) == {"exact_match": 0.5}
    assert (result["mixing"], result["experts"]) == (None, ["maths"])


def test_few_shot_examples_come_before_each_question(model: Path) -> None:
    zero, two = measure(model, "sums", limit=2), measure(model, "sums", limit=2, fewshot=2)
    assert [row["fewshot"] for row in zero["results"]] == [0, 0]
    assert [row["fewshot"] for row in two["results"]] == [2, 2]
    assert measure(model, "sums", limit=2, fewshot=2)["results"] == two["results"]


def test_texts_that_lose_their_beginning_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a context of 10 tokens: `5 + 13 =` and ` 18` have 11 of them, the document's too."""
    (tmp_path / "sums.jsonl").write_text(
        json.dumps({"question": "5 + 13 =", "choices": ["18", "1"], "answer": 0}) + "\n"
    )
    shutil.copy(TASKS / "sums.yaml", tmp_path)
    monkeypatch.setattr(small_server, "CONTEXT", 10)
    short = small_server.save_small_mixture(tmp_path)
    options = HarnessOptions([str(tmp_path / "sums.yaml")])
    result = evaluate_tasks(short, options, Console(quiet=True))
    assert (result["requests"], result["truncated"]) == (2, 1)
    assert "1 of 2 texts" in str(harness_table(result).caption)


def test_the_seed_of_the_process_is_left_alone(model: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    measure(model, "sums", limit=1, fewshot=1)
    assert torch.rand(1) == expected


@pytest.fixture
def pyper(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pyper", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main.run()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


def test_the_command_prints_a_table_or_one_json_object(
    pyper: Callable[..., tuple[int, str, str]], model: Path
) -> None:
    tasks = ",".join(str(TASKS / f"{name}.yaml") for name in ("sums", "tales"))
    code, shown, noise = pyper("evaluate", model, "--tasks", tasks, "--limit", 2)
    assert code == 0
    assert noise == ""
    for word in ("pyper_sums", "acc_norm", "bits_per_byte", "posterior mixing", "0.4."):
        assert word in " ".join(shown.split())  # a long path wraps the title

    code, text, _ = pyper(
        "evaluate", model, "--tasks", tasks, "--limit", 2, "--json",
        "--mixing", "top1", "--batch-tokens", 64, "--device", "cpu",
    )  # fmt: skip
    result = json.loads(text)
    assert result["mixing"] == "top1"
    row = result["results"][0]
    assert set(row) == {"task", "metric", "filter", "value", "stderr", "n", "fewshot", "version"}
    assert row["task"] == "pyper_sums"
    assert row["n"] == 2
    assert result["lm_eval"].startswith("0.")


def test_a_terminal_shows_our_bars_and_no_others(model: Path) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=100)
    evaluate_tasks(model, HarnessOptions([str(TASKS / "sums.yaml")], limit=2), screen)
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "log-likelihoods" in shown
    assert "8/8" in shown
    assert "it/s" not in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ("--limit", 3),
        ("--expert", "law"),
        ("--tasks", "a", "--leak-probe"),
        ("--tasks", "a", "--set", "evaluate.tokens=5"),
        ("--tasks", "a", "--limit", 0),
    ],
)
def test_options_that_do_not_go_together(
    pyper: Callable[..., tuple[int, str, str]], model: Path, arguments: tuple[Any, ...]
) -> None:
    assert pyper("evaluate", model, *arguments)[0] == 2


def test_a_metric_that_is_not_computed_is_named(model: Path, tmp_path: Path) -> None:
    text = (TASKS / "sums.yaml").read_text().replace("metric: acc_norm", "metric: accuracy")
    (tmp_path / "own.yaml").write_text(text)
    shutil.copy(TASKS / "sums.jsonl", tmp_path)
    result = evaluate_tasks(
        model, HarnessOptions([str(tmp_path / "own.yaml")], limit=2), Console(quiet=True)
    )
    assert result["missing"] == ["pyper_sums: accuracy"]
    assert "no value of pyper_sums: accuracy" in str(harness_table(result).caption)
    assert measure(model, "sums", "tales", "writing", limit=1)["missing"] == []
