"""Tasks, metrics and packages that are missing or broken are named, with what to do about it."""

import shutil
from pathlib import Path

import pytest
from own_tasks import TASKS, measure
from rich.console import Console

from pyper.errors import PyperError
from pyper.stages.harness import HarnessOptions, evaluate_tasks

pytest.importorskip("lm_eval")

# The libraries' own.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.usefixtures("own_cache", "one_thread"),
]
TASK = """task: mine
dataset_path: {path}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
"""


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (TASK.format(path="nobody/nothing"), "`{file}` cannot be had", "data_files"),
        (TASK.format(path="json").replace("test_split: test", ""), "", ""),
        ("task: [", "`{file}` cannot be used", ""),
        ("words: 2", "no `task: NAME`", "data_files"),
        (
            TASK.format(path="json")
            + f"dataset_kwargs: {{data_files: {{test: {TASKS / 'sums.jsonl'}}}}}\n"
            + "unsafe_code: true\n",
            "unsafe",
            "",
        ),
        (
            TASK.format(path="json").replace("{{choices}}", "{{chioces}}")
            + f"dataset_kwargs: {{data_files: {{test: {TASKS / 'sums.jsonl'}}}}}\n",
            "",
            "",
        ),
    ],
)
def test_a_task_that_cannot_be_had_is_named(
    model: Path, tmp_path: Path, text: str, message: str, hint: str
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(PyperError) as refused:
        evaluate_tasks(model, HarnessOptions([str(file)]), Console(quiet=True))
    assert message.format(file=file) in refused.value.message
    assert hint in refused.value.hint
    assert "mine" in refused.value.message


def test_a_task_that_wants_more_than_the_context_holds(model: Path, tmp_path: Path) -> None:
    text = (TASKS / "writing.yaml").read_text().replace("max_gen_toks: 8", "max_gen_toks: 5000")
    (tmp_path / "long.yaml").write_text(text)
    shutil.copy(TASKS / "sums.jsonl", tmp_path)
    with pytest.raises(PyperError, match="5,000 new tokens"):
        evaluate_tasks(model, HarnessOptions([str(tmp_path / "long.yaml")]), Console(quiet=True))
    (tmp_path / "long.yaml").write_text(text.replace("max_gen_toks: 5000", "num_beams: 4"))
    with pytest.raises(PyperError, match="num_beams"):
        evaluate_tasks(model, HarnessOptions([str(tmp_path / "long.yaml")]), Console(quiet=True))


def test_two_files_with_one_name_are_refused(model: Path, tmp_path: Path) -> None:
    """The results of one would take the place of the other's."""
    for name in ("sums.yaml", "sums.jsonl"):
        shutil.copy(TASKS / name, tmp_path)
    files = [str(TASKS / "sums.yaml"), str(tmp_path / "sums.yaml")]
    with pytest.raises(PyperError, match="`pyper_sums`, as another task is"):
        evaluate_tasks(model, HarnessOptions(files), Console(quiet=True))


def test_code_of_a_task_that_fails_is_no_traceback(model: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def results(doc, results):\n    return doc.total\n")
    text = (TASKS / "writing.yaml").read_text() + "process_results: !function own.results\n"
    (tmp_path / "own.yaml").write_text(text)
    shutil.copy(TASKS / "sums.jsonl", tmp_path)
    with pytest.raises(PyperError, match="AttributeError") as refused:
        evaluate_tasks(model, HarnessOptions([str(tmp_path / "own.yaml")]), Console(quiet=True))
    assert refused.value.hint


def test_a_missing_extra(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "lm_eval" else found(name)
    )
    with pytest.raises(PyperError) as refused:
        measure(model, "sums")
    assert "`lm-eval`" in refused.value.message
    assert "pip install 'pyper[eval]'" in refused.value.hint


@pytest.mark.slow  # ten seconds: thousands of tasks are known by name
def test_named_tasks_without_network(model: Path) -> None:
    for name, message, hint in [
        ("arc_eazy", "no task `arc_eazy`", "did you mean `arc_easy`"),
        ("zzzzzz", "no task `zzzzzz`", "a task of your own"),
        ("arc_easy", "`arc_easy` cannot be had", "data_files"),
    ]:
        with pytest.raises(PyperError) as refused:
            evaluate_tasks(model, HarnessOptions([name]), Console(quiet=True))
        assert message in refused.value.message
        assert hint in refused.value.hint
